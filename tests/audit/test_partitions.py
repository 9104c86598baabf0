"""A partition per month: there before it is needed, and where it is missing, nothing stops."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from relay_grpc.db import Database
from relay_grpc.ids import time_of
from relay_grpc.schema import migrate
from tests.audit.log import assert_proven, event_at, integrated, log_events
from tests.harness import Databases, running, settings_for

TABLES = ("audit_logs", "audit_values", "audit_leaves")
MAKE = "SELECT relay_make_audit_partitions()"
WORKSPACE = UUID(int=0)


def month(ahead: int) -> datetime:
    """When the month begins that is so many after this one."""
    now = datetime.now(UTC)
    months = now.year * 12 + now.month - 1 + ahead
    return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)


@pytest.fixture
async def url(databases: Databases) -> AsyncIterator[str]:
    async with databases.new() as made:
        yield made


@pytest.fixture
async def connection(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def partitions(connection: Any, table: str = "audit_logs") -> set[str]:
    rows = await connection.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = $1::regclass", table
    )
    return {row["name"].removeprefix(f"{table}_") for row in rows}


async def forget(connection: Any, *months: int) -> None:
    """As if the partitions of these months had never been made."""
    for ahead in months:
        for table in TABLES:
            await connection.execute(f"DROP TABLE {table}_{month(ahead):%Y_%m}")


async def to_default(connection: Any, table: str) -> None:
    """The rows of this month go where they would have gone without its partition."""
    part = f"{table}_{month(0):%Y_%m}"
    await connection.execute(f"ALTER TABLE {table} DETACH PARTITION {part}")
    await connection.execute(f"INSERT INTO {table}_default SELECT * FROM {part}")
    await connection.execute(f"DROP TABLE {part}")


async def place_of(connection: Any, id_: UUID) -> list[str]:
    """The partitions where an event and its values are."""
    rows = await connection.fetch(
        """
        SELECT tableoid::regclass::text AS name FROM audit_logs WHERE id = $1
        UNION ALL SELECT tableoid::regclass::text FROM audit_values WHERE id = $1
        """,
        id_,
    )
    return [row["name"].split("_", 2)[2] for row in rows]


async def test_an_event_is_in_its_month_to_the_millisecond(url: str, connection: Any) -> None:
    for table in TABLES:
        assert await partitions(connection, table) == {"default", *(f"{month(n):%Y_%m}" for n in range(4))}
    ends = [month(n) for n in range(5)]
    millisecond = timedelta(milliseconds=1)
    events = [event_at(end + shift, WORKSPACE) for end in ends for shift in (-millisecond, timedelta(0))]
    await log_events(url, events)
    for event in events:
        at = time_of(event.id)
        expected = f"{at:%Y_%m}" if month(0) <= at < month(4) else "default"
        assert await place_of(connection, event.id) == [expected] * 2, at


async def test_every_session_tells_months_alike(connection: Any) -> None:
    before = {table: await partitions(connection, table) for table in TABLES}
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago", "UTC"):
        await forget(connection, 1, 2)
        await connection.execute(f"SET timezone = '{zone}'; SET datestyle = 'German, DMY'")
        await connection.fetch(MAKE)
        bounds = await connection.fetch(
            """
            SELECT relname, pg_get_expr(relpartbound, oid) AS bound FROM pg_class
             WHERE relispartition AND relkind = 'r' AND relname !~ 'default' ORDER BY relname
            """
        )
        for row in bounds:
            first, beyond = (time_of(UUID(text)) for text in row["bound"].split("'")[1::2])
            assert row["relname"].endswith(f"{first:%Y_%m}")
            assert (first.day, beyond) == (1, (first + timedelta(days=31)).replace(day=1)), zone
        assert {table: await partitions(connection, table) for table in TABLES} == before


async def test_where_a_month_is_missing_nothing_stops_and_its_events_are_moved(
    connection: Any, url: str, data_dir: Path
) -> None:
    async with running(url, settings_for(data_dir)) as relay, relay.connect(relay.tenant.admin) as client:
        await integrated(relay)
        kept = await connection.fetch("SELECT * FROM audit_events WHERE workspace_id = $1", relay.tenant.workspace_id)
        for table in TABLES:
            async with connection.transaction():
                await to_default(connection, table)
        strays = [event_at(month(-n) + timedelta(days=3), relay.tenant.workspace_id) for n in (1, 1, 2, 5)]
        ahead = event_at(month(7), relay.tenant.workspace_id)
        await log_events(url, [*strays, ahead])
        for number in range(10):
            await client.auth.create_api_key(f"meanwhile {number}", "viewer")
        await integrated(relay)
        before = await connection.fetch("SELECT * FROM audit_events ORDER BY id")
        assert len(before) > len(kept) + 10
        async with relay.app.db.worker() as worker:
            left = await worker.fetchval(MAKE)
        assert left == 1, "what a clock said that was months ahead stays in DEFAULT, and is counted"
        assert await place_of(connection, ahead.id) == ["default"] * 2
        assert await partitions(connection) == {
            "default",
            *(f"{month(n):%Y_%m}" for n in (-5, -2, -1, 0, 1, 2, 3)),
        }
        for event in strays:
            assert await place_of(connection, event.id) == [f"{time_of(event.id):%Y_%m}"] * 2
        assert await connection.fetch("SELECT * FROM audit_events ORDER BY id") == before
        assert await connection.fetchval("SELECT count(*) FROM audit_leaves_default") == 1
        await client.auth.create_api_key("afterwards", "viewer")
        await integrated(relay)
        await assert_proven(connection, relay.tenant.workspace_id)
    for part in (f"audit_logs_{month(-5):%Y_%m}", f"audit_logs_{month(0):%Y_%m}", "audit_logs_default"):
        for statement in (f"DELETE FROM {part}", f"UPDATE {part} SET reason = ''", f"TRUNCATE {part}"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append only"):
                await connection.execute(statement)


async def test_many_callers_make_each_partition_once(url: str, connection: Any) -> None:
    before = {table: await partitions(connection, table) for table in TABLES}
    db = await Database.open(url)

    async def make() -> None:
        async with db.worker() as worker:
            await worker.fetch(MAKE)

    for _ in range(3):
        await forget(connection, 1, 2, 3)
        await asyncio.gather(*(make() for _ in range(8)))
        assert {table: await partitions(connection, table) for table in TABLES} == before
    await db.close()


async def test_who_has_to_wait_too_long_gives_up_and_leaves_nothing_behind(url: str, connection: Any) -> None:
    await forget(connection, 3)
    before = await connection.fetch("SELECT relname FROM pg_class ORDER BY 1")
    other = await asyncpg.connect(url)
    await other.execute("SET ROLE relay_worker; SET lock_timeout = '100ms'")
    transaction = connection.transaction()
    await transaction.start()
    await connection.fetch("SELECT FROM audit_logs")  # a reader of all months, who is in no hurry
    with pytest.raises(asyncpg.LockNotAvailableError):
        await other.fetch(MAKE)
    assert await other.fetch("SELECT relname FROM pg_class ORDER BY 1") == before
    await transaction.rollback()
    await other.fetch(MAKE)
    assert f"{month(3):%Y_%m}" in await partitions(connection)
    await other.close()


async def test_writers_and_readers_go_on_while_partitions_are_made(url: str, connection: Any, data_dir: Path) -> None:
    async with running(url, settings_for(data_dir)) as relay, relay.connect(relay.tenant.admin) as client:
        done, stopped = 0, asyncio.Event()

        async def work(name: int) -> None:
            nonlocal done
            while not stopped.is_set():
                await client.auth.create_api_key(f"key of {name}", "viewer")
                async with relay.app.db.workspace(relay.tenant.workspace_id) as reader:
                    await reader.fetch("SELECT FROM audit_events ORDER BY id DESC LIMIT 5")  # in all months
                done += 1

        workers = [asyncio.create_task(work(name)) for name in range(8)]
        for _ in range(5):
            for ahead in (1, 2, 3):
                await forget(connection, ahead)
            async with relay.app.db.worker() as worker:
                await worker.fetch(MAKE)
            await asyncio.sleep(0.1)
        stopped.set()
        await asyncio.gather(*workers)  # none of them failed
        assert done > 20
        await integrated(relay)
        await assert_proven(connection, relay.tenant.workspace_id)


async def test_nobody_who_writes_fails_while_this_month_is_made(url: str, connection: Any, data_dir: Path) -> None:
    """Whoever comes to DEFAULT at that moment has picked a partition that is no longer the right one."""
    async with running(url, settings_for(data_dir)) as relay, relay.connect(relay.tenant.admin) as client:
        stopped = asyncio.Event()

        async def work(name: int) -> int:
            done = 0
            while not stopped.is_set():
                await client.auth.create_api_key(f"key of {name}", "viewer")
                done += 1
            return done

        workers = [asyncio.create_task(work(name)) for name in range(8)]
        for _ in range(5):
            async with connection.transaction():
                await connection.execute("LOCK TABLE audit_values, audit_logs, audit_leaves")
                for table in TABLES:
                    await to_default(connection, table)
            await asyncio.sleep(0.2)
            async with relay.app.db.worker() as worker:
                assert await worker.fetchval(MAKE) == 0
        stopped.set()
        assert sum(await asyncio.gather(*workers)) > 20  # none of them failed
        await integrated(relay)
        await assert_proven(connection, relay.tenant.workspace_id)


async def test_a_migration_ends_with_them(url: str, connection: Any) -> None:
    await forget(connection, 0, 2)
    await asyncio.to_thread(migrate, url)
    for table in TABLES:
        assert await partitions(connection, table) == {"default", *(f"{month(n):%Y_%m}" for n in range(4))}
