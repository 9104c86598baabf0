"""Heartbeats: how many instances share a limit while Redis does not count for them, and who no longer does."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from relay_grpc.db import Database
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.instances import INTERVAL, STALE_AFTER, Instances
from tests.actions.caller import eventually
from tests.harness import Databases, running, settings_for
from tests.rpc.wire import wired

BEAT, STALE = 0.1, 1.0  # seconds


@pytest.fixture
async def url(databases: Databases) -> AsyncIterator[str]:
    async with databases.new() as url:
        yield url


@asynccontextmanager
async def instance(url: str, beat: float = BEAT, stale: float = STALE) -> AsyncIterator[Instances]:
    db = await Database.open(url)
    instances = Instances(db, interval=beat, stale_after=stale)
    await instances.start()
    try:
        yield instances
    finally:
        await instances.stop()
        await db.close()


async def rows(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        count: int = await connection.fetchval("SELECT count(*) FROM instances")
        return count
    finally:
        await connection.close()


async def test_instances_know_of_each_other_and_who_stops_is_gone_at_once(url: str) -> None:
    async with instance(url) as one:
        assert one.live == 1  # from the first beat on
        async with instance(url) as two:
            assert two.live == 2
            await one.beat()
            assert one.live == 2
        await one.beat()
        assert one.live == 1
    assert await rows(url) == 0


@pytest.mark.long
async def test_a_killed_instance_is_gone_once_it_is_stale(url: str, long: bool, figure: Callable[[str], None]) -> None:
    beat, stale = (INTERVAL, STALE_AFTER) if long else (BEAT, STALE)
    async with instance(url, beat, stale) as one:
        arguments = [str(Path(__file__).with_name("instance.py")), url, str(beat), str(stale)]
        child = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
        try:
            assert child.stdout is not None
            assert await child.stdout.readline() == b"alive\n"
            await eventually(lambda: one.live == 2)
            await asyncio.sleep(1.5 * stale)
            assert one.live == 2  # it beats
        finally:
            child.kill()
            await child.wait()
        killed = time.monotonic()
        async with asyncio.timeout(3 * stale + 10):
            while one.live != 1:
                await asyncio.sleep(0.01)
        gone = time.monotonic() - killed
        figure(f"{gone:.1f} s after kill -9, with a beat every {beat} s and {stale} s without one")
        assert gone > stale - 2 * beat
        assert gone <= 15
        assert await rows(url) == 1


async def test_while_the_database_is_away_the_count_stays(
    postgres: EmbeddedPostgres, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = await asyncpg.connect(postgres.url())
    database = url.split("/")[3].split("?")[0]

    async def allow(connections: str) -> None:
        await admin.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS {connections}")

    async with instance(url) as one, instance(url) as two:
        await eventually(lambda: one.live == 2)
        lives: list[int] = []
        beat = one.beat

        async def noted() -> None:
            try:
                await beat()
            finally:
                lives.append(one.live)

        monkeypatch.setattr(one, "beat", noted)
        await allow("false")
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database)
        try:
            await asyncio.sleep(1.5 * STALE)  # by then each of them is stale to the other
        finally:
            await allow("true")
        away = len(lives)
        await eventually(lambda: len(lives) > away + 5)
        assert away
        assert set(lives) == {2}
        assert two.live == 2
    await admin.close()


async def test_without_redis_each_server_grants_its_share(url: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, RELAY_RATE_LIMIT_CALLS_PER_MIN="1000")
    async with running(url, settings) as one, wired(one) as first:

        def limits_of(wire: object) -> Callable[[], Awaitable[str]]:
            async def limit() -> str:
                return str((await wire.call("AuthService.WhoAmI")).trailing["ratelimit-limit"])

            return limit

        assert await limits_of(first)() == "1000"
        async with running(url, settings) as two, wired(two) as second:
            assert await limits_of(second)() == "500"
            await told(limits_of(first), "500")
            assert one.app.metrics.registry.get_sample_value("relay_instances") == 2


async def told(limit: Callable[[], Awaitable[str]], expected: str) -> None:
    async def is_told() -> bool:
        await asyncio.sleep(0.1)
        return await limit() == expected

    await eventually(is_told)
