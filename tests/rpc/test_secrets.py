"""Hundreds of secrets, planted wherever a caller or an operator can put one, come out nowhere.

On a real server process at DEBUG level, with a real Redis, issuer and OTLP receiver, on every kind of path: success,
refusal, throttle, rate limit, bad request, database error, timeout, cancellation, and receivers that fail.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import grpc
from aiohttp import web
from google.protobuf.field_mask_pb2 import FieldMask
from relay.v1 import actions_pb2, auth_pb2, connections_pb2

from relay_grpc.bootstrap import bootstrap
from relay_grpc.connections.secrets import Sealed, Vault
from relay_grpc.embedded import EmbeddedPostgres
from tests import valkey
from tests.auth.issuer import AUDIENCE, Issuer, issuing
from tests.contract.requests import all_fields, fitting, put
from tests.harness import Databases, Receiver, receiving, settings_for
from tests.processes import Server, served, started
from tests.rpc.plants import Plants, embedded
from tests.rpc.resources import path
from tests.rpc.wire import METHODS, Answer, Wire

# Whom a user is: an identifier, which the log of who did what to whom is about.
IDENTIFIERS = {"user_id", "issuer"}
ENOUGH = 100  # secrets
GUARDED = ("previews", "api_keys", "connections", "connection_secrets", "action_executions")


@dataclass
class Stage:
    """A server process, and everything around it.

    admin: a key. http: where the sidecar is. vault: opens what it keeps. another: starts one more server, with these
    settings. told: what came out.
    """

    plants: Plants
    wire: Wire
    http: str
    admin: str
    postgres: Any
    receiver: Receiver
    issuer: Issuer
    vault: Vault
    another: Callable[..., AbstractAsyncContextManager[Server]]
    connection_id: str = ""
    answers: list[Answer] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)

    async def call(
        self, scene: str, name: str, request: Any = b"", key: str | None = None, timeout: float = 30, **metadata: str
    ) -> Answer:
        """A call that is full of secrets which are none of Relay's business. key: "" sends none."""
        new = self.plants.new
        noise = {
            "cookie": f"session={new(f'{scene}: cookie')}",
            "proxy_authorization": f"Basic {base64.b64encode(new(f'{scene}: proxy').encode()).decode()}",
            "x_custom": new(f"{scene}: custom metadata"),
            "x_request_id": f"Bearer {new(f'{scene}: request id')}",
            "x_forwarded_for": new(f"{scene}: x-forwarded-for"),
            "traceparent": f"00-{new(f'{scene}: traceparent')}-01",
            "tracestate": f"vendor={new(f'{scene}: tracestate')}",
            "baggage": f"token={new(f'{scene}: baggage')}",
        }
        answer = await self.wire.call(name, request, self.admin if key is None else key, timeout, **noise | metadata)
        self.answers.append(answer)
        return answer

    def parameters(self, scene: str) -> dict[str, Any]:
        """Of an action: secrets as values, as names, and deep inside."""
        value, name, deep = (self.plants.new(f"{scene}: {part}", kept=True) for part in ("value", "name", "deep"))
        return {"payload": {"to": value, name: [{"deep": deep}]}}

    async def preview(self, scene: str, connection_id: str = "", key: str | None = None, timeout: float = 30) -> Answer:
        message = actions_pb2.PreviewRequest(action="webhook.send", connection_id=connection_id or self.connection_id)
        message.parameters.update(self.parameters(scene))
        return await self.call(scene, "ActionsService.Preview", message, key, timeout)

    async def execute(self, scene: str, connection_id: str = "", key: str | None = None) -> Answer:
        preview = await self.preview(scene, connection_id, key)
        idempotency_key = self.plants.new(f"{scene}: idempotency key", kept=True)
        message = actions_pb2.ExecuteRequest(preview_id=preview.reply.id, idempotency_key=idempotency_key)
        return await self.call(scene, "ActionsService.Execute", message, key)

    async def connect(self, scene: str, url: str) -> str:
        """A connection to a URL whose query is secret, with a header and a signing secret of the caller's."""
        message = connections_pb2.CreateConnectionRequest(
            name=f"connection {scene}",
            webhook={
                "url": f"{url}?token={self.plants.new(f'{scene}: query', kept=True)}",
                "body_signature": True,
                "headers": {"Authorization": f"Bearer {self.plants.new(f'{scene}: header')}"},
            },
            signing_secret=self.signing_secret(scene),
        )
        return str((await self.call(scene, "ConnectionsService.CreateConnection", message)).reply.id)

    def signing_secret(self, scene: str) -> str:
        raw = self.plants.new(f"{scene}: signing secret")
        return "whsec_" + base64.b64encode(raw.encode() * 2).decode()

    async def change_secrets(self, scene: str) -> None:
        """Of its connection: the header and the signing secrets, one of them a key that the server makes."""
        value = f"Basic {self.plants.new(f'{scene}: a new header')}"
        changed = connections_pb2.Connection(id=self.connection_id, webhook={"headers": {"Authorization": value}})
        mask = FieldMask(paths=["webhook.headers"])
        for validate_only in (True, False):
            update = connections_pb2.UpdateConnectionRequest(
                connection=changed, update_mask=mask, validate_only=validate_only
            )
            assert (await self.call(scene, "ConnectionsService.UpdateConnection", update)).code == "OK"
        rotate = connections_pb2.RotateSecretRequest(id=self.connection_id, signing_secret=self.signing_secret(scene))
        assert (await self.call(scene, "ConnectionsService.RotateSecret", rotate)).code == "OK"
        plain = connections_pb2.UpdateConnectionRequest(
            connection={"id": self.connection_id}, update_mask=FieldMask(paths=["webhook.body_signature"])
        )
        assert (await self.call(scene, "ConnectionsService.UpdateConnection", plain)).code == "OK"
        rotate = connections_pb2.RotateSecretRequest(
            id=self.connection_id, signature_scheme=connections_pb2.SIGNATURE_SCHEME_ED25519
        )
        assert (await self.call(scene, "ConnectionsService.RotateSecret", rotate)).code == "OK"
        row = await self.postgres.fetchrow(
            "SELECT * FROM connection_secrets WHERE connection_id = $1 AND kind = 'ed25519'", self.connection_id
        )
        raw = self.vault.open(
            Sealed(row["encryption_key_id"], row["wrapped_key"], row["ciphertext"]),
            workspace_id=row["workspace_id"],
            connection_id=row["connection_id"],
            secret_id=row["id"],
        )
        for written in (raw.hex(), base64.b64encode(raw).decode()):
            self.plants.known(written, f"{scene}: an Ed25519 key")

    async def new_key(self, scene: str, **fields: Any) -> auth_pb2.ApiKey:
        message = auth_pb2.CreateApiKeyRequest(name=scene, **{"role": "developer"} | fields)
        made = (await self.call(scene, "AuthService.CreateApiKey", message)).reply
        self.plants.key(made.secret, f"{scene}: a key")
        return made


async def success(stage: Stage) -> None:
    scene = "success"
    stage.connection_id = await stage.connect(scene, stage.receiver.url)
    key = await stage.new_key(scene)
    assert (await stage.execute(scene, key=key.secret)).reply.state == actions_pb2.EXECUTION_STATE_SUCCESS
    await stage.change_secrets(scene)
    assert (await stage.execute(scene, key=key.secret)).reply.state == actions_pb2.EXECUTION_STATE_SUCCESS
    verify = auth_pb2.VerifyApiKeyRequest(key=key.secret)
    assert (await stage.call(scene, "AuthService.VerifyApiKey", verify)).reply.principal.id == key.id
    rotated = (await stage.call(scene, "AuthService.RotateApiKey", auth_pb2.RotateApiKeyRequest(id=key.id))).reply
    stage.plants.key(rotated.secret, f"{scene}: a rotated key")
    await stage.call(scene, "AuthService.RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=rotated.id))
    token = stage.issuer.token(stage.issuer.claims(jti=stage.plants.new(f"{scene}: token")))
    stage.plants.known(token.rpartition(".")[2], f"{scene}: a token's signature")
    assert (await stage.call(scene, "AuthService.WhoAmI", key=token)).reply.id == "alice"


async def refusal(stage: Stage) -> None:
    scene, new, claims = "refusal", stage.plants.new, stage.issuer.claims
    revoked = await stage.new_key(scene)
    await stage.call(scene, "AuthService.RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=revoked.id))
    mistyped = stage.plants.unknown_key("a mistyped key")[:-1] + "!"
    sub = {"sub": "alice", "jti": new(f"{scene}: token of another issuer")}
    credentials = [
        revoked.secret,
        mistyped,
        f"rk_live_{new('a text like a key')}",
        new("a password as a key"),
        stage.issuer.token(claims(iss="https://elsewhere.example", **sub)),
        stage.issuer.token(claims(jti=new("an expired token"), exp=1)),
        stage.issuer.token(claims(jti=new("a token with a wrong signature")))[:-8] + new("a signature")[-8:],
        stage.issuer.token(claims(sub="nobody", jti=new("a token of a user without a role"))),
        f"{new('no header')}.{new('no payload')}.{new('no signature')}",
    ]
    for credential in credentials:
        answer = await stage.call(scene, "AuthService.WhoAmI", key=credential)
        assert answer.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"), answer
    basic = base64.b64encode(f"user:{new('a password')}".encode()).decode()
    assert (await stage.call(scene, "AuthService.WhoAmI", key="", authorization=f"Basic {basic}")).reason
    assert (await stage.call(scene, "AuthService.WhoAmI", key="", x_api_key=new("x-api-key"))).reason
    workspace = new("x-relay-workspace")
    assert (await stage.call(scene, "AuthService.WhoAmI", x_relay_workspace=workspace)).code == "INVALID_ARGUMENT"
    viewer = await stage.new_key(scene, role="viewer")
    connect = connections_pb2.CreateConnectionRequest(signing_secret=new("a secret of somebody who may not"))
    answer = await stage.call(scene, "ConnectionsService.CreateConnection", connect, viewer.secret)
    assert answer.reason == "SCOPE_MISSING"
    misplaced = stage.plants.unknown_key("a key as request id")
    assert (await stage.call(scene, "AuthService.WhoAmI", x_request_id=misplaced)).code == "OK"


async def throttle(stage: Stage) -> None:
    reasons = set()
    for _ in range(15):
        key = stage.plants.unknown_key("a guess")
        answer = await stage.call("throttle", "AuthService.WhoAmI", key=key, x_forwarded_for="192.0.2.1")
        reasons.add(answer.reason)
    assert reasons == {"CREDENTIALS_INVALID", "AUTHENTICATION_THROTTLED"}


async def rate_limit(stage: Stage) -> None:
    key = await stage.new_key("rate limit", limits={"calls_per_minute": 3})
    answers = [await stage.preview("rate limit", key=key.secret) for _ in range(6)]
    assert {answer.code for answer in answers} == {"OK", "RESOURCE_EXHAUSTED"}


async def bad_request(stage: Stage) -> None:
    """Every text of every request, of those that are too long and of none that fit."""
    for method in METHODS.values():
        for fields in all_fields(method.input_type.DESCRIPTOR):
            where = f"bad request: {method.name}.{path(fields)}"
            if fields[-1].name in IDENTIFIERS or fields[-1].type != fields[-1].TYPE_STRING:
                continue
            message = fitting(method.input_type.DESCRIPTOR)
            for text in (f"\n{stage.plants.new(where, kept=True)}\n", stage.plants.new(where) * 300):
                put(message, fields, [text] if fields[-1].is_repeated else text)
                stage.answers.append(await stage.wire.call(method, message))
        junk = f"\xff{stage.plants.new(f'bytes as a {method.name}')}".encode("latin-1")
        stage.answers.append(await stage.wire.call(method, junk))
    new = stage.plants.new
    for parameters in (
        {"payload": new("a text where an object should be")},
        {"payload": {}, "method": new("no method")},
        {"payload": {}, new("no parameter"): new("of no parameter")},
        {"payload": {"much": new("too much") * 20_000}},
    ):
        message = actions_pb2.PreviewRequest(action="webhook.send", connection_id=stage.connection_id)
        message.parameters.update(parameters)
        assert (await stage.call("bad request", "ActionsService.Preview", message)).code == "INVALID_ARGUMENT"
    for url in (
        "http://user:{}@127.0.0.1/",
        "https://127.0.0.1/#{}",
        "ftp://{}",
        "http://{}@127.0.0.1/{}",
        "http://127.1/{}",
    ):
        secret = new("a URL that is refused")
        message = connections_pb2.CreateConnectionRequest(name=url, webhook={"url": url.replace("{}", secret)})
        answer = await stage.call("bad request", "ConnectionsService.CreateConnection", message)
        assert answer.code == "INVALID_ARGUMENT", url
    for headers in ({"x": "{}\n"}, {"x": "{}" * 50}, {"{} ": "x"}, {"Authorization: {}": ""}, {"webhook-id": "{}"}):
        secret = new("a header that is refused")
        named = {name.replace("{}", secret): value.replace("{}", secret) for name, value in headers.items()}
        webhook = connections_pb2.WebhookConfiguration(url=stage.receiver.url, headers=named)
        message = connections_pb2.CreateConnectionRequest(name="refused", webhook=webhook)
        answer = await stage.call("bad request", "ConnectionsService.CreateConnection", message)
        assert answer.code == "INVALID_ARGUMENT", headers


async def database_error(stage: Stage) -> None:
    """A defect whose row Postgres would quote; a table that is gone; sessions that are cut off."""
    scene, postgres = "database error", stage.postgres
    previewed = await stage.preview(scene)
    execute = actions_pb2.ExecuteRequest(preview_id=previewed.reply.id, idempotency_key=stage.plants.new(scene))
    for table in GUARDED:
        await postgres.execute(f"ALTER TABLE {table} ADD CONSTRAINT seeded CHECK (false) NOT VALID")
    new_key = auth_pb2.CreateApiKeyRequest(name=scene, role="viewer")
    connect = connections_pb2.CreateConnectionRequest(
        name=scene, webhook={"url": f"{stage.receiver.url}?token={stage.plants.new(f'{scene}: a new query')}"}
    )
    codes = [
        (await stage.preview(scene)).code,
        (await stage.call(scene, "ActionsService.Execute", execute)).code,
        (await stage.call(scene, "AuthService.CreateApiKey", new_key)).code,
        (await stage.call(scene, "ConnectionsService.CreateConnection", connect)).code,
    ]
    assert set(codes) == {"INTERNAL"}
    for table in GUARDED:
        await postgres.execute(f"ALTER TABLE {table} DROP CONSTRAINT seeded")
    await postgres.execute("ALTER TABLE previews RENAME TO elsewhere")
    assert (await stage.preview(scene)).code == "INTERNAL"
    await postgres.execute("ALTER TABLE elsewhere RENAME TO previews")
    async with postgres.transaction():
        await postgres.execute("LOCK TABLE previews")
        cut_off = asyncio.create_task(stage.preview(scene))
        await asyncio.sleep(0.2)
        await postgres.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'relay relay_%'"
        )
        assert (await cut_off).code == "UNAVAILABLE"


async def timeout(stage: Stage) -> None:
    """A row lock that is not had, a deadline that passes, a caller that goes away: in the middle of a transaction."""
    scene = "timeout"
    async with stage.postgres.transaction():
        await stage.postgres.execute("LOCK TABLE previews")
        assert (await stage.preview(scene)).code == "ABORTED"
        assert (await stage.preview(scene, timeout=0.1)).code == "DEADLINE_EXCEEDED"
        gone = asyncio.create_task(stage.preview(scene))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


async def failing_receivers(stage: Stage) -> None:
    """Receivers that say back what they got, send it elsewhere, hang, or are not there."""
    scene = "failing receivers"

    async def answer(request: web.Request) -> web.StreamResponse:
        echo = f"{request.url} {dict(request.headers)} {(await request.read()).decode()}"
        match request.path:
            case "/refuses":
                return web.Response(status=500, text=echo, headers={"x-echo": str(request.url)})
            case "/redirects":
                return web.Response(status=302, headers={"location": f"http://user:{echo[-40:-4]}@127.0.0.1/"})
            case "/hangs":
                await asyncio.sleep(3)
            case "/breaks":
                request.transport.write(f"HTTP/1.1 {echo}\r\n\r\n".encode())  # type: ignore[union-attr]
                request.transport.close()  # type: ignore[union-attr]
        return web.Response(text=echo)

    stage.receiver.answer = answer
    base = stage.receiver.url.rpartition("/")[0]
    states = set()
    for name in ("refuses", "redirects", "hangs", "breaks", "succeeds"):
        connection_id = await stage.connect(name, f"{base}/{name}")
        states.add((await stage.execute(scene, connection_id)).reply.state)
    host = (
        f"{stage.plants.new('a host name', kept=True, shown=['audit log'])}.invalid"  # of a URL, events tell the origin
    )
    for name, url in (("nobody listens", "http://127.0.0.1:9/"), ("no such name", f"http://{host}/")):
        states.add((await stage.execute(scene, await stage.connect(name, url))).reply.state)
    assert states == {actions_pb2.EXECUTION_STATE_PENDING, actions_pb2.EXECUTION_STATE_SUCCESS}
    unsigned = await stage.connect("unsigned", f"{base}/succeeds")
    await stage.postgres.execute(
        "UPDATE connection_secrets SET ciphertext = wrapped_key WHERE connection_id = $1", unsigned
    )
    assert (await stage.execute(scene, unsigned)).reply.state == actions_pb2.EXECUTION_STATE_PENDING


async def http(stage: Stage) -> None:
    """The sidecar: queries, headers, paths, and bytes that are not HTTP."""
    new = stage.plants.new
    async with aiohttp.ClientSession() as client:
        for target in ("metrics", "readyz", "livez", new("HTTP path")):
            url = f"http://{stage.http}/{target}?token={new('HTTP query')}"
            headers = {"authorization": f"Bearer {new('HTTP header')}", "user-agent": new("HTTP user agent")}
            for method in ("GET", "POST", new("HTTP method")):
                async with client.request(method, url, headers=headers) as response:
                    stage.answers.append(Answer(str(response.status), await response.text()))
    host, _, port = stage.http.rpartition(":")
    for line in (
        "GET / HTTP/9.{}",
        "{}",
        "GET /\x01{} HTTP/1.1",
        "GET / HTTP/1.1\r\n{}\x01: {}",
        "GET / HTTP/1.1\r\nx: \x00{}",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(line.replace("{}", new("bytes that are not HTTP")).encode("latin-1") + b"\r\n\r\n")
        stage.answers.append(Answer("HTTP", (await reader.read()).decode("latin-1")))
        writer.close()


SCENES: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    success,
    refusal,
    throttle,
    rate_limit,
    bad_request,
    database_error,
    timeout,
    failing_receivers,
    http,
)


@asynccontextmanager
async def staged(url: str, folder: Path, module: str = "relay_grpc") -> AsyncIterator[Stage]:
    """A stage on this database. What came out is told when the block has ended."""
    plants = Plants()
    async with AsyncExitStack() as stack:
        issuer = await stack.enter_async_context(issuing())
        receiver = await stack.enter_async_context(receiving())
        collector = await stack.enter_async_context(receiving())
        collector.answer = _refusing_one
        redis = stack.enter_context(valkey.running())
        redis.client.config_set("requirepass", password := plants.new("REDIS_URL"))
        environ = {
            **_environ(plants, receiver.url, issuer.url),
            "DATABASE_URL": url.replace("://relay@", f"://relay:{plants.new('DATABASE_URL')}@"),
            "REDIS_URL": redis.url.replace("://", f"://:{password}@"),
            "OTEL_ENDPOINT": collector.url.replace("://", f"://user:{plants.new('OTEL_ENDPOINT')}@"),
        }
        made = await bootstrap(url, settings_for(folder, **environ))
        for role, key in made.keys.items():
            plants.key(key, f"the first key of the role {role}")
        postgres = await asyncpg.connect(url)
        stack.push_async_callback(postgres.close)
        await postgres.execute(
            """
            INSERT INTO user_roles (id, workspace_id, issuer, user_id, role, created_by)
            VALUES (gen_random_uuid(), $1, $2, 'alice', 'developer', '')
            """,
            made.workspace_id,
            issuer.url,
        )
        async with served(url, folder, module=module, **environ) as (address, http_address):
            agent = (("grpc.primary_user_agent", plants.new("user agent")),)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, agent))
            admin = made.keys["admin"]
            vault = Vault({key.id: key.key for key in settings_for(folder, **environ).encryption_keys})
            another = partial(started, url, folder, module=module, **environ)
            wire = Wire(channel, admin)
            stage = Stage(plants, wire, http_address, admin, postgres, receiver, issuer, vault, another)
            yield stage
            stage.told["keys in Redis"] = str(list(redis.client.scan_iter()))
            redis.kill()
            await stage.call("Redis is lost", "AuthService.WhoAmI")
            async with aiohttp.ClientSession() as client, client.get(f"http://{http_address}/metrics") as answer:
                stage.told["metrics"] = await answer.text()
        rows = await postgres.fetch("SELECT to_jsonb(a)::text AS row FROM audit_events a")
        stage.told["audit log"] = "\n".join(row["row"] for row in rows)
        stage.told["errors"] = "\n".join(f"{one.text} {one.status} {one.trailing}" for one in stage.answers)
        stage.told["spans"] = b"\n".join(body for _, body in collector.requests).decode("latin-1")
        stage.told["log"] = "\n".join(log.read_text() for log in folder.glob("*.log"))


def _environ(plants: Plants, webhook_url: str, issuer_url: str) -> dict[str, str]:
    return {
        "RELAY_ENV": "development",
        "RELAY_LOG_LEVEL": "DEBUG",
        "OTEL_ENABLED": "true",
        "RELAY_OTEL_SAMPLE_RATIO": "1",
        "RELAY_OIDC_ISSUERS": f"{issuer_url} {AUDIENCE}",
        "RELAY_TRUSTED_PROXIES": "127.0.0.0/8",
        "RELAY_ATTEMPT_TIMEOUT": "0.5",
        "RELAY_LEASE": "1.5",
        "RELAY_HASH_KEY": plants.new("RELAY_HASH_KEY") * 2,
        "RELAY_ENCRYPTION_KEYS": _named_key(plants.new("RELAY_ENCRYPTION_KEYS")),
        "RELAY_KEY_PEPPERS": _named_key(plants.new("RELAY_KEY_PEPPERS")),
        "WEBHOOK_URL": f"{webhook_url}?token={plants.new('WEBHOOK_URL', kept=True)}",
        "ACTIONS_SIGNING_SECRET": plants.new("ACTIONS_SIGNING_SECRET") * 2,
    }


def _named_key(secret: str) -> str:
    return f"one:{base64.b64encode(secret.encode().ljust(32, b'.')).decode()}"


async def _refusing_one(request: web.Request) -> web.Response:
    """An OTLP receiver that refuses every fourth batch: what is refused is complained about."""
    return web.Response(status=400 if len(await request.read()) % 4 == 0 else 200)


async def rows_of_all_tables(postgres: Any) -> str:
    names = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')"
    query = " UNION ALL ".join(f"SELECT to_jsonb(t)::text FROM {name} t" for (name,) in await postgres.fetch(names))
    return "\n".join(row for (row,) in await postgres.fetch(query))


async def test_what_is_planted_comes_out_nowhere(
    databases: Databases, postgres: EmbeddedPostgres, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    async with databases.new() as url:
        async with staged(url, tmp_path) as stage:
            for scene in SCENES:
                await scene(stage)
            tables = await rows_of_all_tables(stage.postgres)
        stage.told["log of Postgres"] = (postgres._folder / "server.log").read_text()
    assert {place for place, text in stage.told.items() if not text} == set()
    assert " DEBUG " in stage.told["log"]
    assert len(stage.plants.where) >= ENOUGH
    assert stage.plants.found(stage.told, tables) == []
    figure(
        f"{len(stage.plants.where)} secrets in {len(stage.answers)} calls, 0 found in {', '.join(stage.told)}, tables"
    )


async def test_a_server_that_logs_what_it_is_shown_is_found_out(databases: Databases, tmp_path: Path) -> None:
    async with databases.new() as url, staged(url, tmp_path, "tests.rpc.talkative") as stage:
        await refusal(stage)
    found = stage.plants.found(stage.told)
    assert {line.partition(":")[0] for line in found} == {"log"}
    for where in ("refusal: a key", "a text like a key", "a password as a key", "x-api-key"):
        assert [line for line in found if f"({where}) as base64" in line], where


def test_secrets_are_found_in_every_form() -> None:
    for _ in range(100):
        plants, others = Plants(), Plants()
        secret = plants.new("here")
        others.new("elsewhere")
        for form, text in embedded(secret):
            assert plants.found({"log": f"... {text} ..."}), form
            assert plants.found({}, tables=text)
            assert others.found({"log": text}) == []
