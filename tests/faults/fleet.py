"""Two server processes that share a database and a Redis, and the load on them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import grpc
from google.rpc import error_details_pb2, status_pb2

from relay_grpc.bootstrap import bootstrap
from relay_grpc.settings import Settings
from tests.actions.caller import eventually
from tests.harness import settings_for
from tests.processes import served
from tests.valkey import Valkey

METHOD = "/relay.v1.AuthService/WhoAmI"  # one unit of the budget of calls
CONNECTIONS = 4  # of the load, to each instance
OUTSTANDING = 500  # calls of a load at one time, at most


@dataclass(frozen=True)
class Sample:
    """One call. sent: seconds since the epoch. took: seconds. hint: those after which a refused one may come back."""

    sent: float
    took: float
    code: str
    hint: float = 0.0


@dataclass
class Instance:
    """A server process, by its gRPC methods on several connections, and where its metrics are."""

    methods: list[Any]
    http: str
    calls: int = 0

    async def call(self, key: str) -> Sample:
        self.calls += 1
        method = self.methods[self.calls % len(self.methods)]
        code, hint, sent, started = "OK", 0.0, time.time(), time.perf_counter()
        try:
            await method(b"", metadata=(("x-api-key", key),), timeout=30)
        except grpc.aio.AioRpcError as error:
            code, hint = error.code().name, _hint(error)
        return Sample(sent, time.perf_counter() - started, code, hint)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.http}/metrics") as response:
            text = await response.text()  # parsed as a whole, it would hold up the load for tens of ms
        lines = [line for line in text.splitlines() if line.startswith((name + " ", name + "{"))]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))


@dataclass
class Fleet:
    instances: list[Instance]
    valkey: Valkey
    url: str
    settings: Settings

    async def new_workspace(self, calls_per_minute: int) -> tuple[UUID, str]:
        """A workspace that may make so many calls, of which none is made yet, and a key of it."""
        made = await bootstrap(self.url, self.settings, workspace=f"tenant {uuid4()}")
        connection = await asyncpg.connect(self.url)
        await connection.execute(
            "UPDATE workspaces SET calls_per_minute = $2 WHERE id = $1", made.workspace_id, calls_per_minute
        )
        await connection.close()
        return made.workspace_id, made.keys["developer"]

    async def admitted(self) -> int:
        """Calls of METHOD that the servers let through so far."""
        of_method = {"method": METHOD.rpartition("/")[2], "code": "OK"}
        return int(sum([await one.metric("relay_rpc_total", **of_method) for one in self.instances]))

    async def degraded(self) -> list[float]:
        return [await one.metric("relay_rate_limiter_degraded") for one in self.instances]

    async def load(self, key: str, rate: float, goes_on: Callable[[], bool]) -> list[Sample]:
        """Makes `rate` calls a second, in turns on each instance, as long as it goes on."""
        tasks: list[asyncio.Task[Sample]] = []
        under_way = asyncio.Semaphore(OUTSTANDING)
        due = time.perf_counter()

        async def call(instance: Instance) -> Sample:
            try:
                return await instance.call(key)
            finally:
                under_way.release()

        while goes_on():
            due += 1 / rate
            await asyncio.sleep(due - time.perf_counter())
            await under_way.acquire()
            tasks.append(asyncio.create_task(call(self.instances[len(tasks) % len(self.instances)])))
        return await asyncio.gather(*tasks)


@asynccontextmanager
async def two_instances(url: str, valkey: Valkey, folder: Path, **environ: str) -> AsyncIterator[Fleet]:
    """The fleet, once each of the two knows of the other and counts in Redis."""
    settings = settings_for(folder)
    async with AsyncExitStack() as stack:
        serving = [stack.enter_async_context(served(url, folder, REDIS_URL=valkey.url, **environ)) for _ in range(2)]
        instances = []
        for grpc_at, http_at in await asyncio.gather(*serving):
            options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(grpc_at, options)) for _ in range(CONNECTIONS)
            ]
            instances.append(Instance([channel.unary_unary(METHOD) for channel in channels], http_at))
        fleet = Fleet(instances, valkey, url, settings)

        async def ready() -> bool:
            lives = [await one.metric("relay_instances") for one in instances]
            return lives == [2, 2] and await fleet.degraded() == [0, 0]

        await eventually(ready)
        yield fleet


def _hint(error: grpc.aio.AioRpcError) -> float:
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    info = error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(packed).details:
        if detail.Unpack(info):
            return info.retry_delay.ToTimedelta().total_seconds()
    return 0.0
