"""The command `relay` as a person and a script meet it: real processes against a real server."""

import asyncio
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import typer
from aiohttp import web

from relay_grpc import datafolder
from relay_grpc.cli import values
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.settings import Settings
from tests.actions.caller import answering, received
from tests.harness import Databases, Receiver, Relay, running, settings_for

PAYLOAD = '{"payload": {"amount": 5}}'


@dataclass
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Shell:
    """Runs `relay` with nothing of this process's environment, in an empty home, as the tenant's admin."""

    home: Path
    address: str
    admin: str

    async def __call__(self, *arguments: str, key: str | None = None, stdin: str = "", **environ: str) -> Ended:
        """key: the API key, "" for none. Whatever is asked, piped output holds neither that key nor escape codes."""
        key = self.admin if key is None else key
        process = await self.start(*arguments, key=key, **environ)
        out, err = (stream.decode() for stream in await process.communicate(stdin.encode()))
        assert process.returncode is not None
        assert "\x1b" not in out + err
        assert "Traceback" not in err
        assert not key or key not in out + err
        return Ended(process.returncode, out, err)

    async def start(self, *arguments: str, key: str | None = None, **environ: str) -> Any:
        """The process of a command, with pipes."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "relay_grpc", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environ(self.admin if key is None else key) | environ,
        )

    async def on_terminal(self, *arguments: str, answer: str = "", columns: int = 80, **environ: str) -> Ended:
        """The same on a terminal: `out` is all that it shows. answer: what is typed once it asks."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "relay_grpc", *arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=self.environ(self.admin) | {"TERM": "xterm-256color", "COLUMNS": ""} | environ,
        )
        os.close(theirs)
        shown = await asyncio.to_thread(_converse, ours, answer)
        assert self.admin not in shown
        return Ended(await process.wait(), shown, "")

    def environ(self, key: str) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "XDG_DATA_HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "RELAY_ADDRESS": self.address,
            "RELAY_API_KEY": key,
            "COLUMNS": "200",
        }


def _converse(terminal: int, answer: str) -> str:
    shown = b""
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
            if answer and shown.endswith(b": "):
                os.write(terminal, answer.encode())
                answer = ""
    except OSError:  # the process has closed its end
        pass
    os.close(terminal)
    return shown.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def shell(relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("home"), str(relay.app.listen), relay.tenant.admin)


@pytest.fixture(scope="module")
async def closed_port() -> str:
    """An address where nothing answers."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    server.close()
    await server.wait_closed()
    return f"{host}:{port}"


async def connect_to(relay: Relay, receiver: Receiver) -> str:
    """The id of a connection to the receiver."""
    async with relay.connect(relay.tenant.admin) as client:
        made = await client.connections.create_webhook(f"receiver {uuid4()}", receiver.url)
    return str(made.id)


def run_on(connection: str, parameters: str = PAYLOAD) -> tuple[str, ...]:
    return ("actions", "run", "webhook.send", "--parameters", parameters, "--connection", connection)


async def test_the_main_job_by_script(shell: Shell, receiver: Receiver) -> None:
    connection = (await shell("connections", "create", "orders", "--url", receiver.url, "--json")).json
    run = await shell(*run_on(connection["id"]), "--yes", "--json")
    assert (run.code, run.json["state"]) == (0, "EXECUTION_STATE_SUCCESS")
    assert "POST" in run.err, "what will happen is told beside the document"
    assert receiver.ids() == [run.json["id"]]
    receiver.verify(connection["signingSecret"])

    listed, attempts, audited = await asyncio.gather(
        shell("--json", "executions", "list", "--connection", connection["id"], "--state", "success"),
        shell("executions", "attempts", run.json["id"], "--json"),
        shell("audit", "list", "--action", "ActionsService.Execute", "--outcome", "success", "--since", "1h", "--json"),
    )
    assert listed.json == [run.json]
    assert [(attempt["number"], attempt["statusCode"]) for attempt in attempts.json] == [(1, 200)]
    assert audited.json[0]["target"] == f"executions/{run.json['id']}"


async def test_a_preview_is_executed_once_however_often_it_is_asked(
    relay: Relay, shell: Shell, receiver: Receiver
) -> None:
    connection = await connect_to(relay, receiver)
    preview = ("actions", "preview", "webhook.send", "--parameters", "-", "--connection", connection, "--json")
    previewed = await shell(*preview, stdin=PAYLOAD)
    assert not receiver.requests
    execute = ("actions", "execute", previewed.json["id"], "--json")
    once = await shell(*execute)
    again, other_key = await asyncio.gather(shell(*execute), shell(*execute, "--idempotency-key", "another"))
    assert again.json == once.json | {"replayed": True}
    assert (other_key.code, other_key.out) == (5, "")
    assert "PREVIEW_USED" in other_key.err
    assert len(receiver.requests) == 1


async def test_an_execution_that_fails_ends_with_1(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    async def gone(_: web.Request) -> web.Response:
        return web.Response(status=410)

    receiver.answer = gone
    run = await shell(*run_on(await connect_to(relay, receiver)), "--yes")
    assert run.code == 1
    assert "failed" in run.out
    assert "HTTP 410" in run.out


async def test_what_could_be_executed_is_asked_without_doing_it(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    connection = await connect_to(relay, receiver)
    preview = ("actions", "preview", "webhook.send", "--parameters", PAYLOAD, "--connection", connection, "--json")
    previewed = (await shell(*preview)).json
    asked = await shell("actions", "execute", previewed["id"], "--validate-only", "--json")
    assert (asked.code, asked.json["id"], asked.json["previewId"]) == (0, "", previewed["id"])
    assert asked.err == "It could be executed. Nothing was done.\n"
    assert not receiver.requests
    done = (await shell("actions", "execute", previewed["id"], "--json")).json
    again = await shell("actions", "execute", previewed["id"], "--validate-only", "--json")
    assert (again.json["id"], again.json["replayed"], again.err) == (done["id"], True, "")
    assert len(receiver.requests) == 1


async def test_a_watch_tells_each_change_until_the_end(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    answering(receiver, 500)
    run = await shell(*run_on(await connect_to(relay, receiver)), "--yes", "--json")
    execution = run.json["id"]
    assert (run.code, run.json["state"]) == (0, "EXECUTION_STATE_PENDING")
    script = await shell.start("executions", "watch", execution, "--json")
    person = await shell.start("executions", "watch", execution)
    lines = [[await one.stdout.readline()] for one in (script, person)]  # which come at once, through a pipe too
    answering(receiver, 200)
    await relay.sql("UPDATE action_executions SET next_attempt_at = now() WHERE id = $1", UUID(execution))
    for one, read in zip((script, person), lines, strict=True):
        read += (await one.communicate())[0].splitlines()
        assert one.returncode == 0
    states = [json.loads(line)["state"] for line in lines[0]]
    assert [states[0], states[-1]] == ["EXECUTION_STATE_PENDING", "EXECUTION_STATE_SUCCESS"]
    first, last = (lines[1][place].decode().strip() for place in (0, -1))
    assert re.fullmatch(r"[\d:]{8}  pending  attempt 1 refused, HTTP 500: .*, next at [\d:]{8}", first)
    assert re.fullmatch(r"[\d:]{8}  success  attempt 2 success, HTTP 200", last)


async def test_an_execution_is_cancelled_and_sent_again(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    answering(receiver, 500)
    run = await shell(*run_on(await connect_to(relay, receiver)), "--yes", "--json")
    too_early = await shell("executions", "resend", run.json["id"])
    assert (too_early.code, "EXECUTION_STATE" in too_early.err) == (5, True)
    cancelled = await shell("executions", "cancel", run.json["id"])
    assert (cancelled.code, "cancelled" in cancelled.out) == (0, True)
    watched = await shell("executions", "watch", run.json["id"])
    assert (watched.code, len(watched.out.splitlines())) == (1, 1)
    answering(receiver, 200)
    assert (await shell("executions", "resend", run.json["id"])).code == 0
    assert (await shell("executions", "watch", run.json["id"])).code == 0
    got = await shell("executions", "get", run.json["id"])
    assert re.search(r"sent anew +once +\n", got.out)
    assert receiver.ids() == [run.json["id"]] * 2


async def test_what_nobody_knows_is_settled(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    answering(receiver, 500)
    connection = await connect_to(relay, receiver)
    once = ("actions", "run", "webhook.send_once", "--parameters", PAYLOAD, "--connection", connection)
    run = await shell(*once, "--yes", "--json")
    assert (run.code, run.json["state"]) == (1, "EXECUTION_STATE_UNKNOWN")
    watched = await shell("executions", "watch", run.json["id"])
    assert (watched.code, "unknown" in watched.out) == (1, True)
    reconcile = ("executions", "reconcile", run.json["id"], "--reason", "it is in their ledger", "--state")
    wrong = await shell(*reconcile, "pending")
    assert (wrong.code, "'pending' is not one of 'success', 'failed'" in " ".join(wrong.err.split())) == (2, True)
    settled = await shell(*reconcile, "success", "--json")
    assert (settled.code, settled.json["state"]) == (0, "EXECUTION_STATE_SUCCESS")


async def test_what_failed_is_recovered(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    answering(receiver, 500)
    async with relay.connect(relay.tenant.admin) as client:
        connection = await client.connections.create_webhook(f"failing {uuid4()}", receiver.url, retry_delays=[])
        for number in range(3):
            preview = await client.actions.preview(
                "webhook.send", {"payload": {"n": number}}, connection_id=connection.id
            )
            await client.actions.execute(preview)
    answering(receiver, 200)
    recover = ("executions", "recover", "--since", "1h", "--connection", connection.id)
    counted, nobody, refused = await asyncio.gather(
        shell(*recover, "--validate-only"), shell(*recover), shell.on_terminal(*recover, answer="n\n")
    )
    assert counted.out == "3 failed executions can be delivered again. Nothing was done.\n"
    assert (nobody.code, "--yes" in nobody.err) == (2, True)
    assert (refused.code, refused.out.endswith("Nothing was done.\n")) == (1, True)
    recovered = await shell(*recover, "--yes", "--json")
    assert (recovered.code, recovered.json["totalCount"], recovered.json["recoveredCount"]) == (0, "3", "3")
    shown, stopped, none = await asyncio.gather(
        shell("executions", "recovery", recovered.json["id"]),
        shell("executions", "cancel-recovery", recovered.json["id"]),
        shell(*recover, "--yes"),
    )
    assert re.search(r"state +ended +\nhanded over +3 of 3 +\n", shown.out)
    assert shown.out == stopped.out, "what has ended can't be stopped"
    assert none.out == "0 failed executions can be delivered again. Nothing was done.\n"
    await received(receiver, 6)


async def test_a_person_is_asked_and_heeded(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    run = run_on(await connect_to(relay, receiver))
    refused = await shell.on_terminal(*run, answer="n\n")
    assert refused.code == 1
    assert refused.out.endswith("Nothing was done.\n")
    assert not receiver.requests
    confirmed = await shell.on_terminal(*run, answer="y\n", NO_COLOR="1")
    assert confirmed.code == 0
    assert "\x1b" not in confirmed.out
    assert len(receiver.requests) == 1


async def test_nobody_is_asked_where_nobody_can_answer(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    run = await shell(*run_on(await connect_to(relay, receiver), "-"), stdin=PAYLOAD)
    assert (run.code, run.out) == (2, "")
    assert "--yes" in run.err
    assert not receiver.requests


async def test_keys_are_made_shown_once_and_revoked(shell: Shell) -> None:
    made, for_people = await asyncio.gather(
        shell("keys", "create", "orders", "--role", "developer", "--expires-in", "90d", "--json"),
        shell("keys", "create", "orders", "--role", "viewer"),
    )
    key = made.json
    assert key["expireTime"] > (datetime.now(UTC) + timedelta(days=89)).isoformat()
    assert "Shown this once" in for_people.out
    assert "\nkey: rk_dev_" in for_people.out
    whoami = await shell("whoami", "--json", key=key["secret"])
    assert (whoami.json["id"], whoami.json["role"]) == (key["id"], "developer")

    assert (await shell("keys", "revoke", key["id"])).code == 0
    listing, as_json, refused = await asyncio.gather(
        shell("keys", "list"), shell("keys", "list", "--json"), shell("whoami", key=key["secret"])
    )
    assert any(key["id"] in line and line.rstrip().endswith("revoked") for line in listing.out.splitlines())
    assert {one["secret"] for one in as_json.json} == {""}
    assert refused.code == 3


async def test_keys_are_rotated_and_verified(relay: Relay, shell: Shell) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        old = await client.auth.create_api_key("rotated", "viewer")
        other = await client.auth.create_api_key("rotated at once", "viewer")
    rotated, at_once = await asyncio.gather(
        shell("keys", "rotate", old.id, "--json"), shell("keys", "rotate", other.id, "--overlap", "0s")
    )
    new = rotated.json
    assert "\nkey: rk_dev_" in at_once.out
    assert "The old key works no more." in at_once.out
    got, valid, lacking, expired, unknown, no_key, asked = await asyncio.gather(
        shell("keys", "get", old.id, "--json"),
        shell("keys", "verify", "--json", stdin=new["secret"] + "\n"),
        shell("keys", "verify", "-", "--scope", "keys:write", "--scope", "actions:read", stdin=new["secret"]),
        shell("keys", "verify", stdin=other.secret),
        shell("keys", "verify", "nonsense"),
        shell("keys", "verify"),
        shell.on_terminal("keys", "verify", answer=old.secret + "\n", NO_COLOR="1"),
    )
    overlap = datetime.fromisoformat(got.json["retireTime"]) - datetime.fromisoformat(new["createTime"])
    assert abs(overlap - timedelta(hours=24)) < timedelta(seconds=5)
    assert (valid.code, valid.json["code"], valid.json["principal"]["id"]) == (0, "VERIFICATION_CODE_VALID", new["id"])
    assert (lacking.code, lacking.out.splitlines()[0].split()) == (1, ["verdict", "insufficient", "scopes"])
    assert "lacks      keys:write " in lacking.out
    assert (expired.code, expired.out) == (1, "verdict  expired\n")
    assert (unknown.code, unknown.out) == (1, "verdict  not found\n")
    assert (no_key.code, no_key.out) == (2, "")
    assert "there is no key on standard input" in no_key.err
    assert (asked.code, "verdict    valid" in asked.out) == (0, True)
    assert old.secret not in asked.out


async def test_roles_are_made_given_and_taken(relay: Relay, shell: Shell, tmp_path: Path) -> None:
    issuer = "http://127.0.0.1:9/realms/somewhere"
    async with running(relay.url, settings_for(tmp_path, RELAY_OIDC_ISSUERS=f"{issuer} relay")) as knowing:
        shell = Shell(shell.home, str(knowing.app.listen), knowing.tenant.admin)
        made = await shell(
            *("roles", "create", "clerk", "--parent", "admin"), *("--scope", "keys:read", "--scope", "keys:write")
        )
        assert (made.code, made.out.split()[:4]) == (0, ["name", "clerk", "narrows", "admin"])
        user = str(uuid4())
        given = await shell("roles", "assign", user, "clerk", "--json")
        assert {"userId": user, "role": "clerk", "issuer": issuer}.items() <= given.json.items()
        roles, assignments, in_use, beyond, unknown = await asyncio.gather(
            shell.on_terminal("roles", "list", NO_COLOR="1"),
            shell.on_terminal("roles", "assignments", NO_COLOR="1"),
            shell("roles", "delete", "clerk"),
            shell("roles", "create", "more", "--parent", "viewer", "--scope", "keys:write"),
            shell("roles", "assign", user, "viewer", "--issuer", "https://elsewhere.example"),
        )
        for table, words in ((roles, ("built in", "clerk")), (assignments, (user, "clerk"))):
            assert all(word in table.out for word in words)
            assert max(map(len, table.out.splitlines())) <= 80
        assert (in_use.code, "ROLE_IN_USE" in in_use.err) == (5, True)
        assert (beyond.code, "keys:write: not of the role viewer" in beyond.err) == (2, True)
        assert (unknown.code, f"it knows {issuer}" in unknown.err) == (2, True)
        assert (await shell("roles", "remove", user)).out == f"{user} has no role any more.\n"
        deleted, none, missing = [
            await shell("roles", *arguments)
            for arguments in (("delete", "clerk", "--json"), ("assignments",), ("delete", "clerk"))
        ]
        assert (deleted.json, missing.code) == ({}, 4)
        assert "'relay roles assign' gives one" in none.out


async def test_tables_fit_80_columns_and_keep_ids_whole(relay: Relay, shell: Shell, receiver: Receiver) -> None:
    connection = await connect_to(relay, receiver)
    async with relay.connect(relay.tenant.admin) as client:
        preview = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=connection)
        execution = await client.actions.execute(preview)
        principal = await client.auth.who_am_i()
    tables = {
        ("keys", "list"): principal.id,
        ("connections", "list"): connection,
        ("executions", "list"): execution.id,
        ("audit", "list"): f"executions/{execution.id}",
    }
    shown = await asyncio.gather(*(shell.on_terminal(*command, NO_COLOR="1") for command in tables))
    for id_, ended in zip(tables.values(), shown, strict=True):
        assert id_ in ended.out
        assert max(map(len, ended.out.splitlines())) <= 80


async def test_colours_are_for_terminals_and_names_can_not_steer_one(relay: Relay, shell: Shell) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        made = await client.connections.create_webhook("\x1b]0;owned\x07[red]x[/red]", "http://127.0.0.1:1/")
    coloured = await shell.on_terminal("connections", "list", columns=120)
    assert "\x1b[1m" in coloured.out, "headings are bold"
    assert "\x1b]" not in coloured.out
    assert "\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}[red]x[/red]" in coloured.out
    as_json = await shell("connections", "get", made.id, "--json")
    assert as_json.out.isascii()
    assert as_json.json["name"] == made.name


async def test_lists_say_where_they_stop(shell: Shell) -> None:
    some, none = await asyncio.gather(
        shell("audit", "list", "--limit", "2", "--json"), shell("executions", "list", "--state", "cancelled", "--json")
    )
    assert len(some.json) == 2
    assert "--limit" in some.err
    assert (none.json, none.err) == ([], "")


async def test_each_kind_of_refusal_has_its_sentence_and_its_exit_code(
    relay: Relay, shell: Shell, closed_port: str
) -> None:
    nowhere = str(uuid4())
    preview = ("actions", "preview", "webhook.send", "--parameters")
    execute = ("actions", "execute", nowhere, "--idempotency-key", "k")
    async with relay.connect(relay.tenant.admin) as client:
        await client.connections.create_webhook("taken", "http://127.0.0.1:1/")
    refusals = (
        (2, "line 1 column 13", (*preview, '{"payload": }')),
        (2, "parameters.payload: ", (*preview, '{"payload": 5}')),
        (3, "unknown, expired or revoked", ("--api-key", "rk_dev_nonsense", "whoami")),
        (3, "keys:read", ("--api-key", relay.tenant.viewer, "keys", "list")),
        (4, nowhere, ("executions", "get", nowhere)),
        (5, "'taken'", ("connections", "create", "taken", "--url", "http://127.0.0.1:1/")),
        (
            7,
            f"no Relay answers at {closed_port}; start one with 'relay serve'\n"
            f"  whether it was done is not known: 'relay {' '.join(execute)}' tells",
            ("--address", closed_port, *execute),
        ),
    )
    all_ended = await asyncio.gather(*(shell(*arguments) for _, _, arguments in refusals))
    for (code, words, arguments), ended in zip(refusals, all_ended, strict=True):
        assert (ended.code, ended.out) == (code, ""), arguments
        assert ended.err.startswith(("error: ", "Usage: ")), arguments
        assert words in ended.err, arguments
        assert relay.tenant.viewer not in ended.err


async def test_a_spent_rate_limit_ends_with_6_and_says_when_to_try_again(
    relay: Relay, shell: Shell, tmp_path: Path
) -> None:
    async with running(relay.url, settings_for(tmp_path, RELAY_RATE_LIMIT_CALLS_PER_MIN="1")) as limited:
        shell = Shell(shell.home, str(limited.app.listen), limited.tenant.admin)
        refused = await shell("whoami")  # the harness has spent the minute's call
    assert refused.code == 6
    assert "try again in" in refused.err


async def test_the_development_key_is_used_on_this_machine_alone(shell: Shell, tmp_path: Path) -> None:
    folder = {"RELAY_DATA_DIR": str(tmp_path), "RELAY_LISTEN": shell.address}
    datafolder.write(tmp_path / datafolder.CREDENTIALS, {"RELAY_ADMIN_KEY": shell.admin})
    here, another, elsewhere, production = await asyncio.gather(
        shell("whoami", "--json", key="", **folder),
        shell("--address", "127.0.0.1:1", "whoami", key="", **folder),  # whoever that is
        shell("--address", "relay.invalid:443", "whoami", key="", **folder),
        shell("whoami", key="", DATABASE_URL="postgresql://u:password@127.0.0.1:1/x", **folder),
    )
    assert here.json["role"] == "admin"
    assert (another.code, elsewhere.code, production.code) == (3, 3, 3)
    assert "RELAY_API_KEY" in elsewhere.err


async def test_the_operators_commands_on_a_database(postgres: EmbeddedPostgres, shell: Shell) -> None:
    name = f"cli_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.url())
    await admin.execute(f"CREATE DATABASE {name}")
    environ = {"DATABASE_URL": postgres.url(name), "RELAY_ENV": "development"}
    try:
        migrated = await shell("migrate", "--database-url", postgres.url(name))
        assert migrated.code == 0, migrated.err
        made = await shell("bootstrap", "--json", **environ)
        assert sorted(made.json["keys"]) == ["admin", "developer"]
        again, other = await asyncio.gather(
            shell("bootstrap", **environ), shell("bootstrap", "--workspace", "second", **environ)
        )
        assert (again.code, other.code) == (0, 0)
        assert made.json["workspaceId"] in again.out
        assert "--new-keys" in again.out
        assert "admin key: rk_dev_" in other.out
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


async def test_the_operators_commands_say_what_is_wrong_with_the_settings(databases: Databases, shell: Shell) -> None:
    unreachable = "postgresql://u:password@127.0.0.1:1/x"
    embedded, wrong, down = await asyncio.gather(
        shell("migrate"), shell("bootstrap", DATABASE_URL=unreachable), shell("migrate", DATABASE_URL=unreachable)
    )
    assert embedded.code == 2
    assert "relay serve" in embedded.err
    assert wrong.code == 2
    assert [line.split(":")[0].strip() for line in wrong.err.removeprefix("error: ").splitlines()] == [
        "RELAY_ENCRYPTION_KEYS",
        "RELAY_KEY_PEPPERS",
        "RELAY_AUDIT_KEYS",
        "RELAY_HASH_KEY",
    ]
    assert down.code == 1
    assert len(down.err.splitlines()) == 1
    assert "password" not in down.err


async def test_keygen_makes_what_production_needs(shell: Shell) -> None:
    made = await shell("keygen")
    values_ = dict(line.split("=", 1) for line in made.out.splitlines())
    settings = Settings.load(values_ | {"DATABASE_URL": "postgresql://127.0.0.1/x"})
    assert [len(keys) for keys in (settings.encryption_keys, settings.key_peppers, settings.audit_keys)] == [1, 1, 1]


async def test_the_help_tells_exit_codes_and_comes_without_the_server(shell: Shell) -> None:
    shown = await shell("--help")
    assert shown.code == 0
    assert all(f"\n {code}  " in shown.out for code in range(8))
    assert all(
        f"│ {command} " in shown.out for command in ("serve", "demo", "migrate", "bootstrap", "keys", "audit", "whoami")
    )
    code = "import sys, relay_grpc.cli; print({'grpc', 'aiohttp', 'asyncpg', 'alembic'} & {*sys.modules})"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out == b"set()\n"


async def test_serve_and_demo_take_their_own_options(shell: Shell) -> None:
    helped = await shell("demo", "--help")
    assert helped.code == 0
    assert "Usage: relay demo " in helped.out
    assert "--once" in helped.out


def test_durations_have_a_unit() -> None:
    assert values.duration("500ms") == timedelta(milliseconds=500)
    assert values.duration("1.5h") == timedelta(minutes=90)
    assert values.duration("30d") == timedelta(days=30)
    for wrong in ("10", "s", "-1s", "1w", "1h30m", "", "999999999999d"):
        with pytest.raises(typer.BadParameter):
            values.duration(wrong)


def test_times_are_local_or_so_long_ago() -> None:
    assert values.time("2026-01-31T15:00+02:00") == datetime(2026, 1, 31, 13, tzinfo=UTC)
    assert values.time("2026-01-31T15:00") == datetime(2026, 1, 31, 15).astimezone()
    assert abs(values.time("2h") - (datetime.now(UTC) - timedelta(hours=2))) < timedelta(minutes=1)
    for wrong in ("yesterday", "2026-13-01", "0001-01-01", ""):
        with pytest.raises(typer.BadParameter):
            values.time(wrong)


def test_parameters_are_a_json_object_wherever_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "parameters.json"
    file.write_text(PAYLOAD)
    assert values.parameters(f"@{file}") == values.parameters(PAYLOAD) == {"payload": {"amount": 5}}
    for wrong in ("[1]", "5", "{", '{"a": NaN}', "[" * 100_000, f"@{tmp_path / 'none'}", "9" * 5000):
        with pytest.raises(typer.BadParameter):
            values.parameters(wrong)
