"""Tries to make a whole Relay reach what it must not. To be run in network and mount namespaces of its own:

    unshare --net --mount python -m tests.stack.ssrf DATABASE FOLDER ADDRESSES ROUNDS

In there, all addresses are this machine's: sentinels listen where nobody may come, and a public receiver where all may.
Prints as JSON what came of it.
"""

import asyncio
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from relay.errors import InvalidRequest
from relay.v1 import actions_pb2, actions_pb2_grpc, connections_pb2, connections_pb2_grpc

from relay_grpc import datafolder
from relay_grpc.app import serving
from relay_grpc.bootstrap import bootstrap
from relay_grpc.settings import Settings
from tests.actions.caller import answer
from tests.actions.spellings import ADDRESSES, spellings
from tests.harness import settings_for

SENTINELS = ("169.254.169.254", "10.0.0.1", "fd00:ec2::254")
PUBLIC = "8.8.8.8"
PORTS = (80, 443, 8080, 8443)
REDIRECTS = (301, 302, 303, 307, 308)
TOGETHER = 16
NAME_SERVER = "127.0.0.1"
A, CNAME = 1, 5
KINDS = ("moves", "both", "alias", "public")  # of names, by what they become


def make_network(folder: Path) -> None:
    """Addresses on the namespace's loopback, and a resolv.conf that only this mount namespace sees."""
    for command in (
        "ip link set lo up",
        *(f"ip address add {one} dev lo" for one in (*SENTINELS, PUBLIC)),
    ):
        subprocess.run(command.split(), check=True)
    (folder / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\noptions timeout:1 attempts:1\n")
    subprocess.run(["mount", "--bind", folder / "resolv.conf", "/etc/resolv.conf"], check=True)


@dataclass
class Names(asyncio.DatagramProtocol):
    """A name server. answers: what a name resolves to at its first question, its second and so on.

    An answer is addresses, or the other name, with a dot at its end, that they are found under. A question for IPv4 is
    one, and the one for IPv6 beside it is not: getaddrinfo asks both.
    """

    answers: Mapping[str, Iterator[Sequence[str]]]
    questions: int = 0
    _now: dict[str, Sequence[str]] = field(default_factory=dict)

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, source: Any) -> None:
        end = data.index(b"\0", 12) + 5
        name, kind = _name(data[12 : end - 4]), int.from_bytes(data[end - 4 : end - 2])
        records = list(self._records(b"\xc0\x0c", name, kind))
        head = data[:2] + b"\x81\x80\0\1" + len(records).to_bytes(2) + bytes(4)
        self._transport.sendto(head + data[12:end] + b"".join(records), source)

    def _records(self, owner: bytes, name: str, kind: int) -> Iterator[bytes]:
        if kind == A and name in self.answers:
            self.questions += 1
            self._now[name] = next(self.answers[name])
        for one in self._now.get(name, ()):
            if one.endswith("."):
                target = b"".join(bytes([len(part)]) + part.encode() for part in one.split("."))
                yield _record(owner, CNAME, target)
                yield from self._records(target, one[:-1], kind)
            elif ip_address(one).version == (4 if kind == A else 6):
                yield _record(owner, kind, ip_address(one).packed)


def _name(encoded: bytes) -> str:
    labels = []
    while encoded[0]:
        labels.append(encoded[1 : 1 + encoded[0]].decode().lower())
        encoded = encoded[1 + encoded[0] :]
    return ".".join(labels)


def _record(owner: bytes, kind: int, data: bytes) -> bytes:
    """Of time to live 0."""
    return owner + kind.to_bytes(2) + b"\0\1" + bytes(4) + len(data).to_bytes(2) + data


@dataclass
class Listeners:
    """Who came, by address. location: of the redirect that the public receiver answers with, if it does."""

    came: Counter[str] = field(default_factory=Counter)
    redirect: str = ""
    delivered: int = 0

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = writer.get_extra_info("sockname")[0]
        self.came[address] += 1
        if address == PUBLIC:
            await reader.readuntil(b"\r\n\r\n")
            self.delivered += 1
            writer.write(f"HTTP/1.1 {self.redirect or 200} OK\r\nconnection: close\r\n\r\n".encode())
        writer.close()

    def sentinels(self) -> int:
        return sum(self.came[address] for address in SENTINELS)


@asynccontextmanager
async def listening() -> AsyncIterator[Listeners]:
    listeners = Listeners()
    servers = [
        await asyncio.start_server(listeners.take, address, port) for address in (*SENTINELS, PUBLIC) for port in PORTS
    ]
    yield listeners
    for server in servers:
        server.close()


@dataclass
class Tenant:
    """Calls one server, and can change connections where no server looks."""

    actions: Any
    connections: Any
    key: str
    sql: "asyncpg.Pool[asyncpg.Record]"

    async def _answer(self, call: Any, request: Any) -> Any:
        return await answer(call(request, metadata=(("authorization", f"Bearer {self.key}"),), timeout=30))

    async def create(self, url: str) -> connections_pb2.Connection:
        """A connection whose executions have one attempt."""
        webhook = connections_pb2.WebhookConfiguration(url=url, retry_policy=connections_pb2.RetryPolicy())
        request = connections_pb2.CreateConnectionRequest(name=str(uuid4()), webhook=webhook)
        return await self._answer(self.connections.CreateConnection, request)

    async def preview(self, connection_id: str) -> actions_pb2.Preview:
        request = actions_pb2.PreviewRequest(
            action="webhook.send", connection_id=connection_id, parameters={"payload": {}}
        )
        return await self._answer(self.actions.Preview, request)

    async def execute(self, preview: actions_pb2.Preview) -> actions_pb2.Execution:
        """Ended."""
        request = actions_pb2.ExecuteRequest(preview_id=preview.id, digest=preview.digest, wait=timedelta(seconds=20))
        return await self._answer(self.actions.Execute, request)

    async def update(self, connection_id: str, url: str) -> connections_pb2.Connection:
        changed = connections_pb2.Connection(id=connection_id, webhook=connections_pb2.WebhookConfiguration(url=url))
        request = connections_pb2.UpdateConnectionRequest(
            connection=changed, update_mask=FieldMask(paths=["webhook.url"])
        )
        return await self._answer(self.connections.UpdateConnection, request)

    async def bend(self, connection_id: str, url: str) -> None:
        """Puts the URL where no check sees it before it is sent to."""
        await self.sql.execute(
            """
            UPDATE connections SET configuration = jsonb_set(configuration, '{url}', to_jsonb($2::text)) WHERE id = $1
            """,
            connection_id,
            url,
        )


@dataclass
class Findings:
    """tried, refused: URLs, by what was tried. words: in which targets were refused. delivered: where it was right."""

    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    words: set[str] = field(default_factory=set)
    delivered: int = 0

    async def refuses(self, what: str, call: Awaitable[Any]) -> None:
        self.tried[what] += 1
        try:
            await call
        except InvalidRequest as refusal:
            self.refused[what] += 1
            if refusal.reason == "EGRESS_REFUSED":
                self.words |= {problem for _, problem in refusal.violations}

    def sent(self, what: str, execution: actions_pb2.Execution) -> None:
        self.tried[what] += 1
        attempt = execution.last_attempt
        if attempt.outcome == actions_pb2.ATTEMPT_OUTCOME_EGRESS_REFUSED and not attempt.status_code:
            self.refused[what] += 1
            self.words.add(attempt.error)


async def literals(tenant: Tenant, addresses: Sequence[str], findings: Findings) -> None:
    """Every spelling of each address at the three places where a URL comes in."""
    together = asyncio.Semaphore(TOGETHER)

    async def one(url: str) -> None:
        async with together:
            await findings.refuses("create", tenant.create(url))
            good = await tenant.create("https://public.example/")
            await findings.refuses("update", tenant.update(good.id, url))
            if "\0" in url:
                return  # nor does Postgres hold it
            preview = await tenant.preview(good.id)
            await tenant.bend(good.id, url)
            findings.sent("send", await tenant.execute(preview))

    hosts = [host for address in addresses for host in spellings(address)]
    await asyncio.gather(*(one(f"https://{host}/") for host in hosts))


async def rebinding(tenant: Tenant, rounds: int, findings: Findings) -> None:
    """Names that the preview finds at a public address, and the delivery elsewhere."""
    together = asyncio.Semaphore(TOGETHER)

    async def one(number: int) -> None:
        kind = KINDS[number % len(KINDS)]
        async with together:
            connection = await tenant.create("http://public.example/")
            await tenant.bend(connection.id, f"http://{kind}-{number}.example:{PORTS[number % len(PORTS)]}/")
            execution = await tenant.execute(await tenant.preview(connection.id))
        if kind == "public":
            findings.delivered += execution.state == actions_pb2.EXECUTION_STATE_SUCCESS
        else:
            findings.sent("rebinding", execution)

    await asyncio.gather(*(one(number) for number in range(rounds)))


async def redirects(tenant: Tenant, listeners: Listeners, findings: Findings) -> None:
    """A receiver that sends everybody on to the sentinels."""
    for status, sentinel in itertools.product(REDIRECTS, SENTINELS):
        listeners.redirect = f"{status} Elsewhere\r\nlocation: http://{_in_url(sentinel)}/\r\nx:"
        connection = await tenant.create("http://public.example:8080/")
        execution = await tenant.execute(await tenant.preview(connection.id))
        findings.tried["redirect"] += 1
        findings.refused["redirect"] += execution.last_attempt.status_code == status
    listeners.redirect = ""


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def answers(rounds: int) -> Mapping[str, Iterator[Sequence[str]]]:
    """What the names of `rebinding` resolve to."""
    made: dict[str, Iterator[Sequence[str]]] = {"public.example": itertools.repeat((PUBLIC,))}
    for number in range(rounds):
        kind = KINDS[number % len(KINDS)]
        sentinel = SENTINELS[number % len(SENTINELS)]
        then = {
            "public": (PUBLIC,),
            "moves": (sentinel,),
            "both": (PUBLIC, sentinel),
            "alias": (f"in-{number}.example.",),
        }
        made[f"{kind}-{number}.example"] = itertools.cycle(((PUBLIC,), then[kind]))
        made[f"in-{number}.example"] = itertools.repeat((sentinel,))
    return made


@asynccontextmanager
async def tenant_of(settings: Settings, url: str, login: str = "") -> AsyncIterator[Tenant]:
    """Of a server with these settings. login: the database's user that it is, in place of the superuser."""
    made = await bootstrap(url, settings, workspace=f"ssrf {settings.env}")
    async with (
        asyncpg.create_pool(url, min_size=1, max_size=2) as sql,
        serving(settings, url.replace("://relay@", f"://{login}@") if login else url) as app,
        grpc.aio.insecure_channel(str(app.listen)) as channel,
    ):
        yield Tenant(
            actions_pb2_grpc.ActionsServiceStub(channel),
            connections_pb2_grpc.ConnectionsServiceStub(channel),
            made.keys["admin"],
            sql,
        )


async def main(url: str, folder: Path, addresses: int, rounds: int) -> None:
    make_network(folder)
    findings = Findings()
    transport, names = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Names(answers(rounds)), local_addr=(NAME_SERVER, 53)
    )
    async with listening() as listeners:
        async with tenant_of(production(url), url, await make_login(url)) as tenant:
            await literals(tenant, ADDRESSES[:addresses], findings)
        async with tenant_of(settings_for(folder / "development"), url) as tenant:
            await rebinding(tenant, rounds, findings)
            await redirects(tenant, listeners, findings)
        reached = listeners.sentinels()
        for address, port in itertools.product(SENTINELS, PORTS):
            _, writer = await asyncio.open_connection(address, port)
            writer.close()
        await asyncio.sleep(0.1)
        print(
            json.dumps(
                {
                    "tried": findings.tried,
                    "refused": findings.refused,
                    "words": sorted(findings.words),
                    "delivered": findings.delivered,
                    "questions": names.questions,
                    "reached": reached,
                    "reachable": listeners.sentinels() - reached,
                }
            )
        )
    transport.close()


async def make_login(url: str) -> str:
    """A login that a server in production takes. It ends with the cluster, as all that tests make in it."""
    sql = await asyncpg.connect(url)
    database = await sql.fetchval("SELECT current_database()")
    await sql.execute(f"ALTER DATABASE {database} SET synchronous_commit = on")
    await sql.execute(f"CREATE ROLE {database}_login LOGIN IN ROLE relay_app, relay_worker")
    await sql.close()
    return f"{database}_login"


def production(url: str) -> Settings:
    limits = {"RATE_LIMIT_EXEC_PER_MIN": "1000000", "RELAY_RATE_LIMIT_CALLS_PER_MIN": "1000000"}
    listen = {"RELAY_LISTEN": "127.0.0.1:0", "RELAY_HTTP_LISTEN": "127.0.0.1:0"}
    environ = {"RELAY_ENV": "production", "ACTIONS_ENABLED": "true", "DATABASE_URL": url}
    return Settings.load(datafolder.new_key_material() | limits | listen | environ)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
