"""`relay connections` as a person and a script meet it."""

import json
from pathlib import Path

import pytest

from tests.harness import Receiver, Relay
from tests.ops.test_cli import Ended, Shell

BEARER = "Bearer of.the.receiver"


@pytest.fixture
def shell(relay: Relay, tmp_path: Path) -> Shell:
    return Shell(tmp_path, str(relay.app.listen), relay.tenant.admin)


async def made(shell: Shell, name: str, url: str, *options: str, stdin: str = "") -> str:
    created = await shell("connections", "create", name, "--url", url, "--json", *options, stdin=stdin)
    assert created.code == 0, created.err
    return str(created.json["id"])


def cells(shown: Ended) -> dict[str, str]:
    """What is shown, by name; lines that go on are joined."""
    found: dict[str, str] = {}
    for line in shown.out.partition("\n\n")[0].splitlines():
        name, _, value = line.strip().partition("  ")
        if line.startswith(" "):
            found[list(found)[-1]] += f" | {line.strip()}"
        else:
            found[name] = value.strip()
    return found


async def test_a_life(shell: Shell, receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "headers.json").write_text(json.dumps({"Authorization": BEARER}))
    created = await shell(
        *("connections", "create", "orders", "--url", receiver.url, "--headers", f"@{tmp_path / 'headers.json'}"),
        *("--retry-delays", "5s, 5m,1h", "--timeout", "2s", "--body-signature", "--default"),
    )
    shown = cells(created)
    assert (shown["headers"], shown["retries"], shown["timeout"]) == ("Authorization", "after 5 s, 5 min, 1 h", "2 s")
    assert shown["signs"] == "hmac sha256 | X-Signature over the body alone"
    assert (shown["name"], shown["breaker"], shown["version"]) == ("orders (default)", "closed", "1")
    assert "signing secret: whsec_" in created.out
    assert BEARER not in created.out
    id_ = shown["id"]
    updated = await shell(
        *("connections", "update", id_, "--name", "ledger", "--no-default", "--no-body-signature"),
        *("--headers", '{"authorization": "", "X-A": "1"}', "--reset", "retry-delays", "--version", "1"),
    )
    shown = cells(updated)
    assert (shown["name"], shown["headers"], shown["signs"]) == ("ledger", "authorization, X-A", "hmac sha256")
    assert "retries" not in shown
    assert shown["version"] == "2"
    rotated = cells(await shell("connections", "rotate-secret", id_, "--ed25519", "--overlap", "1h"))
    assert rotated["signs"].startswith("ed25519 whpk_")
    assert " | hmac sha256, until 2" in rotated["signs"]
    disabled = cells(await shell("connections", "disable", id_, "--reason", "moving house"))
    assert (disabled["name"], disabled["disabled"]) == ("ledger (disabled)", "moving house")
    assert "ledger (disabled)" in (await shell("connections", "list")).out
    assert "disabled" not in cells(await shell("connections", "enable", id_))
    deleted = await shell("connections", "delete", id_, "--yes")
    assert (deleted.code, deleted.out, deleted.err) == (0, "", "It is deleted.\n")
    assert (await shell("connections", "get", id_)).code == 4


async def test_a_secret_from_elsewhere_comes_by_standard_input(shell: Shell, receiver: Receiver) -> None:
    secret = "whsec_" + "QUJD" * 8
    id_ = await made(shell, "moved here", receiver.url, "--signing-secret", "-", stdin=f"{secret}\n")
    rotated = await shell("connections", "rotate-secret", id_, "--signing-secret", "-", "--json", stdin=secret)
    assert rotated.json["signingSecret"] == secret


async def test_validating_says_that_nothing_was_done(shell: Shell, receiver: Receiver) -> None:
    arguments = ("connections", "create", "not yet", "--url", receiver.url, "--validate-only")
    validated = await shell(*arguments)
    assert (validated.code, validated.err) == (0, "It could be done. Nothing was.\n")
    assert "signing secret" not in validated.out
    id_ = await made(shell, "validated", receiver.url)
    would_be = await shell("connections", "update", id_, "--timeout", "5s", "--validate-only", "--json")
    assert (would_be.json["version"], would_be.json["webhook"]["timeout"]) == (2, "5s")
    assert (await shell("connections", "get", id_, "--json")).json["version"] == 1
    assert (await shell(*arguments[:-1])).code == 0


async def test_deleting_asks(shell: Shell, receiver: Receiver) -> None:
    id_ = await made(shell, "asked for", receiver.url)
    refused = await shell("connections", "delete", id_)
    assert (refused.code, "--yes" in refused.err) == (2, True)
    no = await shell.on_terminal("connections", "delete", id_, answer="n\n", columns=120)
    assert (no.code, "Delete the connection asked for and its secrets?" in no.out) == (1, True)
    yes = await shell.on_terminal("connections", "delete", id_, answer="y\n", columns=120)
    assert (yes.code, "It is deleted." in yes.out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("update", "ID"), 2, "nothing to change: give an option"),
        (("update", "ID", "--reset", "url"), 2, "--reset: 'url' should be retry-delays or timeout"),
        (("update", "ID", "--version", "9", "--name", "n"), 7, "the connection is at version 1 by now"),
        (("update", "ID", "--url", "http://10.0.0.1/"), 2, "connection.webhook.url: the destination is not one"),
        (("update", "ID", "--retry-delays", "5x"), 2, "'5x' should be a number with ms, s, m, h or d"),
        (("update", "ID", "--headers", '{"a": 5}'), 2, "every value should be a text"),
        (("update", "ID", "--headers", '{"Host": "a"}'), 2, "host is set by Relay or by HTTP"),
        (("rotate-secret", "ID", "--overlap", "8d"), 2, "overlap"),
        (("rotate-secret", "ID", "--signing-secret", "whsec_x"), 2, "signing_secret"),
    ],
)
async def test_what_is_wrong_is_told(
    shell: Shell, relay: Relay, receiver: Receiver, arguments: tuple[str, ...], code: int, problem: str
) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        connections = [each async for each in client.connections.list() if each.name == "wrong"]
        connection = connections[0] if connections else await client.connections.create_webhook("wrong", receiver.url)
    ended = await shell("connections", *(connection.id if one == "ID" else one for one in arguments))
    assert (ended.code, ended.out) == (code, "")
    assert problem in " ".join(ended.err.split())
