"""Keys revoked under load on two instances: both refuse them within a second, and within ten where no word comes."""

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import grpc
import pytest
from relay.v1 import auth_pb2

from relay_grpc.bootstrap import bootstrap
from relay_grpc.embedded import EmbeddedPostgres
from tests.actions.caller import eventually
from tests.harness import Databases, settings_for
from tests.processes import served

pytestmark = pytest.mark.long
Figure = Callable[[str], None]
AT_A_TIME = 5
LOAD = 200  # other calls a second
PAUSE = 0.02  # seconds between the calls of a key on one instance
REFUSALS = 10  # one after another, after which a key is taken for revoked
SERVICE = "/relay.v1.AuthService/"


@dataclass
class Fleet:
    """Two instances on one database. elsewhere: a connection to another database."""

    channels: Sequence[grpc.aio.Channel]
    http: Sequence[str]
    admin: str
    developer: str
    database: str
    elsewhere: Any

    async def call(self, instance: int, rpc: str, request: Any, key: str) -> Any:
        send = self.channels[instance].unary_unary(SERVICE + rpc, response_deserializer=bytes)
        return await send(request.SerializeToString(), metadata=(("x-api-key", key),), timeout=10)

    async def make_key(self) -> auth_pb2.ApiKey:
        request = auth_pb2.CreateApiKeyRequest(name="to be revoked", role="viewer")
        return auth_pb2.ApiKey.FromString(await self.call(0, "CreateApiKey", request, self.admin))

    async def is_valid(self, instance: int, key: str) -> bool:
        try:
            await self.call(instance, "WhoAmI", auth_pb2.WhoAmIRequest(), key)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise
        return True

    async def listening(self) -> list[int]:
        """Of each instance, whether it hears of changes."""
        async with aiohttp.ClientSession() as session:
            found = []
            for address in self.http:
                async with session.get(f"http://{address}/metrics") as response:
                    gauge = re.search(r"^relay_changes_listening (\S+)$", await response.text(), re.MULTILINE)
                    assert gauge
                    found.append(int(float(gauge[1])))
            return found

    @asynccontextmanager
    async def under_load(self) -> AsyncIterator[None]:
        """While others call, none of whom is refused."""

        async def call_on() -> None:
            began = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for number in range(10**9):
                    await asyncio.sleep(began + number / LOAD - time.monotonic())
                    group.create_task(self._must_be_valid(number % 2))

        load = asyncio.create_task(call_on())
        try:
            yield
            assert not load.done(), await load
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)

    async def _must_be_valid(self, instance: int) -> None:
        assert await self.is_valid(instance, self.developer)

    @asynccontextmanager
    async def deaf(self) -> AsyncIterator[None]:
        """The connections that listen are cut, and no new ones are let in."""
        await self.elsewhere.execute(f"ALTER DATABASE {self.database} ALLOW_CONNECTIONS false")
        try:
            await self.elsewhere.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE application_name = 'relay listener' AND datname = '{self.database}'"
            )
            await eventually(lambda: self.are_listening([0, 0]))
            yield
            assert await self.listening() == [0, 0]
        finally:
            await self.elsewhere.execute(f"ALTER DATABASE {self.database} ALLOW_CONNECTIONS true")

    async def are_listening(self, expected: list[int]) -> bool:
        return await self.listening() == expected


@pytest.fixture(scope="module")
async def fleet(
    databases: Databases, postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("data")
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(databases.new())
        made = await bootstrap(url, settings_for(folder))
        # One connection for calls, which stays: none is opened anew while none is let in.
        serving = [served(url, folder, RELAY_DATABASE_CONNECTIONS="1") for _ in range(2)]
        addresses = await asyncio.gather(*(stack.enter_async_context(one) for one in serving))
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(listen, [("grpc.enable_retries", 0)]))
            for listen, _ in addresses
        ]
        elsewhere = await asyncpg.connect(postgres.url())
        stack.push_async_callback(elsewhere.close)
        one = Fleet(
            channels=channels,
            http=[http_listen for _, http_listen in addresses],
            admin=made.keys["admin"],
            developer=made.keys["developer"],
            database=urlsplit(url).path.strip("/"),
            elsewhere=elsewhere,
        )
        await eventually(lambda: one.are_listening([1, 1]))
        yield one


async def revoked(fleet: Fleet, key: auth_pb2.ApiKey, by: int) -> float:
    """Revokes a key that is in use on both instances; how long after it was asked to, the last call went well."""
    asked, latest = float("inf"), [0.0, 0.0]

    async def use(instance: int) -> None:
        refusals = 0
        while refusals < REFUSALS:
            if await fleet.is_valid(instance, key.secret):
                latest[instance], refusals = time.monotonic(), 0
            else:
                assert time.monotonic() > asked, "refused before it was revoked"
                refusals += 1
            await asyncio.sleep(PAUSE)

    users = [asyncio.create_task(use(instance)) for instance in range(2)]
    await eventually(lambda: all(latest) or any(user.done() for user in users))
    asked = time.monotonic()
    await fleet.call(by, "RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=key.id), fleet.admin)
    await asyncio.gather(*users)
    return max(0.0, max(latest) - asked)


async def revoke(fleet: Fleet, count: int, at_a_time: int) -> list[float]:
    """For each of so many keys, see `revoked`; the shortest first."""
    delays: list[float] = []
    for start in range(0, count, at_a_time):
        made = [await fleet.make_key() for _ in range(min(at_a_time, count - start))]
        by = start // at_a_time % 2  # all by one: it is the other that has to hear of it
        delays += await asyncio.gather(*(revoked(fleet, key, by) for key in made))
    return sorted(delays)


async def test_a_revoked_key_is_refused_everywhere_within_a_second(fleet: Fleet, long: bool, figure: Figure) -> None:
    async with fleet.under_load():
        delays = await revoke(fleet, 100 if long else 10, AT_A_TIME)
    p99 = delays[math.ceil(len(delays) * 0.99) - 1]
    assert p99 <= 1
    figure(f"{len(delays)} revocations: last success after p99 {p99:.3f} s, at most {delays[-1]:.3f} s")


async def test_it_is_refused_within_ten_seconds_where_nobody_hears_of_it(
    fleet: Fleet, long: bool, figure: Figure
) -> None:
    async with fleet.under_load(), fleet.deaf():
        delays = await revoke(fleet, 100 if long else 5, 4 * AT_A_TIME)
    assert delays[-1] <= 10
    await eventually(lambda: fleet.are_listening([1, 1]))
    figure(f"{len(delays)} revocations without LISTEN: last success after at most {delays[-1]:.3f} s")
