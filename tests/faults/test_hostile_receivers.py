"""One tenant's receivers do their worst, and another tenant's deliveries go on as if nothing were."""

import asyncio
import json
import math
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import psutil
import pytest
from aiohttp import web
from relay.errors import FailedPrecondition
from relay.v1 import actions_pb2, actions_pb2_grpc, connections_pb2, connections_pb2_grpc

from relay_grpc.bootstrap import bootstrap
from tests.actions.caller import answer, eventually
from tests.faults.hostile import RETRY_DATE, TRUSTED, behaviours
from tests.harness import Databases, Receiver, settings_for
from tests.processes import ROOT, Server, started

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
Figure = Callable[[str], None]
GRACE = 0.5  # seconds that an attempt may take beyond its timeout
MEMORY = 64 << 20
BASE = timedelta(hours=1)  # the wait before a second attempt, which no test sees
RATE = 50.0  # deliveries of the healthy tenant in a second
WAITS = {"429, 10^12 s": 2 * BASE, "429, a date": RETRY_DATE}  # where it is not BASE
ENDS = {"success": "success", "410": "failed"}  # where an execution does not stay pending, by outcome or name


@dataclass(frozen=True)
class Scale:
    """deliveries: to each hostile receiver. healthy: of the other tenant, as many again while nobody disturbs it.

    noise: seconds; what a tail below it says is about the machine.
    """

    deliveries: int
    healthy: int
    rounds: int
    timeout: float
    drip: float
    noise: float


FULL = Scale(deliveries=20, healthy=1000, rounds=5, timeout=15.0, drip=1.0, noise=0.02)
SMALL = Scale(deliveries=2, healthy=60, rounds=2, timeout=1.0, drip=0.1, noise=0.05)


@dataclass
class Tenant:
    """A workspace's calls to one server."""

    channel: grpc.aio.Channel
    key: str
    actions: Any = field(init=False)
    connections: Any = field(init=False)

    def __post_init__(self) -> None:
        self.actions = actions_pb2_grpc.ActionsServiceStub(self.channel)
        self.connections = connections_pb2_grpc.ConnectionsServiceStub(self.channel)
        self._metadata = (("authorization", f"Bearer {self.key}"),)

    async def connect(self, name: str, url: str) -> connections_pb2.Connection:
        webhook = connections_pb2.WebhookConfiguration(url=url, retry_policy=connections_pb2.RetryPolicy(delays=[BASE]))
        request = connections_pb2.CreateConnectionRequest(name=name, webhook=webhook)
        return await answer(self.connections.CreateConnection(request, metadata=self._metadata))

    async def connection(self, id_: str) -> connections_pb2.Connection:
        request = connections_pb2.GetConnectionRequest(id=id_)
        return await answer(self.connections.GetConnection(request, metadata=self._metadata))

    async def preview(self, connection_id: str, number: int = 0) -> actions_pb2.Preview:
        request = actions_pb2.PreviewRequest(
            action="webhook.send", connection_id=connection_id, parameters={"payload": {"number": number}}
        )
        return await answer(self.actions.Preview(request, metadata=self._metadata))

    async def execute(self, preview: actions_pb2.Preview) -> actions_pb2.Execution:
        request = actions_pb2.ExecuteRequest(preview_id=preview.id, digest=preview.digest, wait=timedelta())
        return await answer(self.actions.Execute(request, metadata=self._metadata, timeout=30))


@dataclass
class Healthy:
    """Sends at a rate that does not wait for answers. seconds: from each Execute to its receipt."""

    tenant: Tenant
    connection_id: str
    seconds: list[float] = field(default_factory=list)
    _asked: dict[int, float] = field(default_factory=dict)

    async def take(self, request: web.Request) -> web.Response:
        number = int(json.loads(await request.read())["number"])
        self.seconds.append(time.monotonic() - self._asked[number])
        return web.Response()

    async def paced(self, count: int) -> list[float]:
        """What each of so many took."""
        self.seconds.clear()
        previews = [await self.tenant.preview(self.connection_id, number) for number in range(count)]
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, preview in enumerate(previews):
                await asyncio.sleep(began + number / RATE - time.monotonic())
                self._asked[number] = time.monotonic()
                group.create_task(self.tenant.execute(preview))
        await eventually(lambda: len(self.seconds) >= count)
        return list(self.seconds)


class Watch:
    """What the server takes of the machine, looked at all the time."""

    def __init__(self, server: Server) -> None:
        self._process = psutil.Process(server.process.pid)
        self.memory = self.peak = self._process.memory_info().rss
        self.sockets = self.count()
        self._looking = asyncio.create_task(self._look())

    def count(self) -> int:
        return len(self._process.net_connections("inet"))

    async def _look(self) -> None:
        while True:
            self.peak = max(self.peak, self._process.memory_info().rss)
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        self._looking.cancel()


@asynccontextmanager
async def neighbourhood(folder: Path, drip: float) -> AsyncIterator[tuple[Mapping[str, str], Callable[[], Any]]]:
    """The hostile receivers in a process of their own: their URLs, and what ends them and tells their requests."""
    command = (sys.executable, "-m", "tests.faults.hostile", str(folder), str(drip))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
    assert process.stdin
    assert process.stdout
    output = process.stdout

    async def ended() -> Mapping[str, int]:
        process.stdin.close()
        told: Mapping[str, int] = json.loads(await output.readline())
        return told

    try:
        yield json.loads(await output.readline()), ended
    finally:
        process.stdin.close()
        await process.wait()


async def test_26_hostile_receivers_and_a_healthy_tenant(
    databases: Databases, tmp_path: Path, receiver: Receiver, long: bool, figure: Figure
) -> None:
    scale = FULL if long else SMALL
    async with AsyncExitStack() as stack:
        urls, requests = await stack.enter_async_context(neighbourhood(tmp_path, scale.drip))
        database = await stack.enter_async_context(databases.new())
        settings = settings_for(tmp_path)
        keys = [(await bootstrap(database, settings, workspace=name)).keys["admin"] for name in ("healthy", "hostile")]
        environ = {"RELAY_ATTEMPT_TIMEOUT": str(scale.timeout), "RELAY_LEASE": str(3 * scale.timeout)}
        environ |= {"SSL_CERT_FILE": str(tmp_path / TRUSTED)}
        server = await stack.enter_async_context(started(database, tmp_path, **environ))
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(server.listen)) for _ in keys]
        tenant, neighbour = (Tenant(channel, key) for channel, key in zip(channels, keys, strict=True))
        healthy = Healthy(tenant, (await tenant.connect("healthy", receiver.url)).id)
        receiver.answer = healthy.take
        connections = {
            name: [(await neighbour.connect(f"{name} {n}", url)).id for n in range(scale.deliveries)]
            for name, url in urls.items()
        }
        sql = await asyncpg.connect(database)
        stack.push_async_callback(sql.close)

        await healthy.paced(50)  # warm
        watch = Watch(server)
        stack.callback(watch.stop)
        quiet, disturbed, gone = [], [], []
        for number in range(scale.rounds):
            quiet.append(p99(await healthy.paced(scale.healthy // scale.rounds)))
            some = range(number, scale.deliveries, scale.rounds)
            previews = [await neighbour.preview(ids[n]) for ids in connections.values() for n in some]
            gone += [await neighbour.preview(connections["410"][n]) for n in some]
            attack = asyncio.gather(*(neighbour.execute(preview) for preview in previews))
            disturbed.append(p99(await healthy.paced(scale.healthy // scale.rounds)))
            await attack
            await settled(sql, scale.timeout)

        await judge(sql, scale, figure)
        for preview in gone:
            assert not (await neighbour.connection(preview.connection_id)).enabled
            with pytest.raises(FailedPrecondition, match="disabled"):
                await neighbour.execute(preview)
        counts = await requests()
        assert counts == {
            one.name: 0 if one.certificate not in ("", "good") else scale.deliveries for one in behaviours(scale.drip)
        }
        await eventually(lambda: watch.count() <= watch.sockets)
        grown = watch.peak - watch.memory
        assert grown <= MEMORY
        tails = statistics.median(disturbed), statistics.median(quiet)
        figure(
            f"{len(urls)} hostile receivers x {scale.deliveries} beside {scale.healthy} healthy deliveries: p99 of"
            f" Execute to receipt {tails[0] * 1000:.1f} ms, without them {tails[1] * 1000:.1f} ms (median of"
            f" {scale.rounds} rounds); memory grew by {grown / (1 << 20):.1f} MiB;"
            f" sockets {watch.count()}, before {watch.sockets}"
        )
        assert tails[0] <= 2 * max(tails[1], scale.noise)


async def settled(sql: asyncpg.Connection, timeout: float) -> None:
    """Waits until no attempt is under way, for as long as one may take."""
    async with asyncio.timeout(2 * timeout + 10):
        while await sql.fetchval("SELECT count(*) FROM action_executions WHERE status = 'executing'"):
            await asyncio.sleep(0.1)


async def judge(sql: asyncpg.Connection, scale: Scale, figure: Figure) -> None:
    """Each attempt ended in time, is what it is, and is followed by what must follow."""
    rows: Sequence[asyncpg.Record] = await sql.fetch(
        """
        SELECT regexp_replace(c.name, ' [0-9]+$', '') AS name, e.status, e.attempt_count, a.outcome, a.status_code,
               a.finished_at - a.started_at AS took, e.next_attempt_at - a.finished_at AS wait,
               octet_length(a.response_excerpt) AS excerpt
          FROM action_executions e
          JOIN execution_attempts a ON a.execution_id = e.id
          JOIN connections c ON c.id = e.connection_id
         WHERE c.name <> 'healthy'
        """
    )
    expected = {one.name: one for one in behaviours(scale.drip)}
    assert len(rows) == len(expected) * scale.deliveries
    slowest = max(row["took"] for row in rows).total_seconds()
    assert slowest <= scale.timeout + GRACE
    for row in rows:
        one = expected[row["name"]]
        assert (row["outcome"], row["status_code"], row["attempt_count"]) == (one.outcome, one.status, 1), one.name
        assert row["excerpt"] <= 4096
        end = ENDS.get(one.name) or ENDS.get(one.outcome, "pending")
        assert row["status"] == end, one.name
        if end == "pending":
            wait = WAITS.get(one.name, BASE)
            assert 0.79 * wait <= row["wait"] <= 1.21 * wait, one.name
    figure(f"{len(rows)} attempts, all classified; the slowest took {slowest:.2f} s of {scale.timeout + GRACE:g} s")


def p99(seconds: Sequence[float]) -> float:
    return sorted(seconds)[math.ceil(len(seconds) * 0.99) - 1]
