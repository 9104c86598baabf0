"""The sequencer: one log a workspace whoever integrates it, and a log that is damaged stops alone."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from relay_grpc.audit import sequencer, store
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import Event
from relay_grpc.jobs import Jobs
from relay_grpc.telemetry import Metrics
from tests.actions.caller import eventually
from tests.audit.log import event_at
from tests.audit.sequencing import KEYS, Logs, assert_sound, logs_of
from tests.faults.postgres import private
from tests.harness import Databases
from tests.processes import started


@pytest.fixture
async def logs(databases: Databases) -> AsyncIterator[Logs]:
    async with databases.new() as url, logs_of(url) as made:
        yield made


async def test_a_log_has_every_event_once_and_all_that_was_signed_is_a_prefix(logs: Logs) -> None:
    first, second = uuid4(), uuid4()
    for count in (1, 2, 255, 1, 300, 40):
        await logs.write(first, count)
        await logs.write(second, 3)
        await logs.integrate()
    assert await assert_sound(logs.sql, signer=logs.signer) == 599 + 18
    assert await logs.sql.fetchval("SELECT count(*) FROM audit_checkpoints WHERE workspace_id = $1", first) == 6
    assert logs.sample("relay_audit_integration_seconds_count") == 599 + 18


async def test_three_that_race_make_one_log(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencer, "BATCH", 20)
    workspaces = [uuid4() for _ in range(5)]
    racing = Jobs({str(n): (0.005, logs.another().integrate) for n in range(3)})
    racing.start()

    async def write(workspace_id: UUID) -> None:
        connection = await asyncpg.connect(logs.url)
        for n in range(40):
            await store.insert(connection, [Event(workspace_id, "test.Happened") for _ in range(1 + n % 7)])
        await connection.close()

    await asyncio.gather(*(write(workspaces[n % 5]) for n in range(10)))

    async def all_are_done() -> bool:
        return not sum([await logs.waiting(id_) for id_ in workspaces])

    await eventually(all_are_done)
    await racing.stop()
    assert await assert_sound(logs.sql, signer=logs.signer) == 10 * sum(1 + n % 7 for n in range(40))


@pytest.mark.long
async def test_a_kill_in_the_middle_leaves_no_gap_and_no_fork(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    """Two processes integrate what a writer writes all the time; one after the other is killed and replaced."""
    rounds = 10 if long else 2
    workspaces = [uuid4() for _ in range(3)]
    written = 0
    async with databases.new() as url:
        sql = await asyncpg.connect(url)

        async def write() -> None:
            nonlocal written
            while True:
                await store.insert(sql, [Event(workspaces[n % 3], "test.Happened") for n in range(30)])
                written += 30
                await asyncio.sleep(0.01)

        async with started(url, tmp_path):  # made the key that both sign with
            writing = asyncio.create_task(write())
            for _ in range(rounds):
                async with started(url, tmp_path) as victim:
                    await asyncio.sleep(0.7)
                    victim.kill()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            await sql.close()
            sql = await asyncpg.connect(url)

            async def none_waits() -> bool:
                return not await sql.fetchval("SELECT count(*) FROM audit_pending")

            await eventually(none_waits)
        assert await assert_sound(sql, workspaces) >= written
        await sql.close()
    figure(f"{rounds} kills while {written} events were written: no gap, no fork")


TILE = "UPDATE audit_tiles SET hashes = {} WHERE workspace_id = '{{0}}' AND level = 0 AND index = 1"
DAMAGES = {
    "a tile is edited": (TILE.format("overlay(hashes placing '\\x00' from 5)"), "don't have the root"),
    "a tile is short": (TILE.format("substr(hashes, 1, 32)"), "ends before"),
    "a tile is long": (TILE.format("hashes || substr(hashes, 1, 32)"), "and not 44"),
    "a tile is gone": ("DELETE FROM audit_tiles WHERE workspace_id = '{0}' AND level = 1", "ends before"),
    "the root is another": (
        "UPDATE audit_checkpoints SET root_hash = sha256('') WHERE workspace_id = '{0}'",
        "don't have the root",
    ),
    "the note is another": (
        "UPDATE audit_checkpoints SET note = replace(note, '300', '301') WHERE workspace_id = '{0}'",
        "none of RELAY_AUDIT_KEYS",
    ),
    "the checkpoint is gone": (
        "DELETE FROM audit_checkpoints WHERE workspace_id = '{0}' AND tree_size = 300",
        "holds 44 hashes, and not 43",
    ),
    "a place is taken": (
        "INSERT INTO audit_leaves SELECT event_id, workspace_id, 300 FROM audit_pending WHERE workspace_id = '{0}'",
        "contradicts",
    ),
    "an event is gone that waits": (
        "DELETE FROM audit_logs l USING audit_pending p WHERE p.workspace_id = '{0}' AND l.id = p.event_id",
        "is gone before it had its place",
    ),
    "an event that waits can't be read": (
        "UPDATE audit_logs l SET commitments = '{{}}' FROM audit_pending p"
        " WHERE p.workspace_id = '{0}' AND l.id = p.event_id",
        "can't be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_log_stops_alone_until_it_is_repaired(
    logs: Logs, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    statement, told = DAMAGES[damage]
    damaged = await logs.new(299)
    await logs.write(damaged)
    await logs.integrate()
    monkeypatch.setattr(sequencer, "BATCH", 50)
    other = await logs.new(1)
    tables = ("audit_tiles", "audit_checkpoints", "audit_leaves", "audit_logs")
    await logs.write(damaged, 160)  # more than a batch of what can't be done
    for table in tables:
        await logs.sql.execute(f"CREATE TABLE before_{table} AS SELECT * FROM {table}")
    await logs.tamper(statement.format(damaged))
    for n in range(3):
        await logs.write(other, 70)
        await logs.sequencer.integrate()
        await logs.integrate()
        assert await logs.size(other) == 1 + 70 * (n + 1)
        assert await logs.size(damaged) in (299, 300)
        assert await logs.waiting(damaged) == 160
    [said] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert str(damaged) in said.message
    assert told in said.message
    assert logs.sample("relay_audit_damaged_logs") == 1
    assert logs.sample("relay_audit_oldest_pending_seconds") > 0
    restore = [f"DELETE FROM {table} WHERE workspace_id = '{damaged}'" for table in tables]
    restore += [
        f"INSERT INTO {table} SELECT * FROM before_{table} WHERE workspace_id = '{damaged}'" for table in tables
    ]
    await logs.tamper(*restore)
    await logs.integrate()
    await logs.integrate()
    assert logs.sample("relay_audit_damaged_logs") == 0
    assert logs.sample("relay_audit_oldest_pending_seconds") == 0
    assert await assert_sound(logs.sql, signer=logs.signer) == 460 + 1 + 210


async def test_what_another_repaired_is_no_longer_told(logs: Logs) -> None:
    damaged = await logs.new(5)
    note = await logs.sql.fetchval("SELECT note FROM audit_checkpoints WHERE workspace_id = $1", damaged)
    await logs.tamper(f"UPDATE audit_checkpoints SET note = '' WHERE workspace_id = '{damaged}'")
    await logs.write(damaged)
    await logs.integrate()
    assert logs.sample("relay_audit_damaged_logs") == 1
    await logs.tamper(f"UPDATE audit_checkpoints SET note = '{note}' WHERE workspace_id = '{damaged}'")
    await logs.another(Metrics()).integrate()
    assert await logs.waiting(damaged) == 0
    await logs.integrate()
    assert logs.sample("relay_audit_damaged_logs") == 0


async def test_keys_change_as_long_as_one_stays(logs: Logs) -> None:
    old, new = KEYS, {"next": b"\x02" * 32}
    workspace_id, quiet = await logs.new(3), await logs.new(1)
    for keys in (old | new, new):
        logs.signer = Signer(keys)
        logs.sequencer = logs.another(logs.metrics)
        await logs.write(workspace_id)
        await logs.integrate()
    assert await assert_sound(logs.sql) == 6
    await logs.write(quiet)  # its last checkpoint is from before the new key was there
    await logs.integrate()
    assert (await logs.size(quiet), await logs.waiting(quiet)) == (1, 1)
    logs.signer = Signer(old | new)
    logs.sequencer = logs.another(logs.metrics)
    await logs.integrate()
    assert await assert_sound(logs.sql) == 7


async def test_events_that_were_written_long_ago_get_their_places_too(logs: Logs) -> None:
    workspace_id = uuid4()
    days = [datetime.now(UTC) - timedelta(days=days) for days in (200, 31, 1)]
    await store.insert(logs.sql, [event_at(day, workspace_id) for day in days])
    await logs.integrate()
    await store.insert(logs.sql, [event_at(day, workspace_id) for day in days])
    await logs.sequencer.integrate()
    assert await logs.waiting(workspace_id) == 3, "they are not looked for each time"
    await logs.integrate()
    assert await assert_sound(logs.sql, signer=logs.signer) == 6


async def test_it_never_reads_a_table_as_a_whole(databases: Databases) -> None:
    """Nothing is known of the tables yet, and then of too few rows; Postgres counts its scans."""
    async with databases.new() as url:
        async with logs_of(url) as logs:
            for _ in range(6):
                await logs.write(uuid4(), 400)
                await logs.write(uuid4(), 1)
                await logs.integrate()
                await logs.sql.execute("ANALYZE")
        sql = await asyncpg.connect(url)
        scanned = await sql.fetch(
            "SELECT relname, seq_scan, idx_scan FROM pg_stat_user_tables"
            " WHERE relname ~ '^audit_(logs|pending|tiles|checkpoints|leaves)'"
        )
        await sql.close()
    assert sum(row["idx_scan"] or 0 for row in scanned) > 100
    assert {row["relname"]: row["seq_scan"] for row in scanned if row["seq_scan"]} == {}


async def test_it_outlives_a_restart_of_postgres_and_stops_while_it_is_frozen(tmp_path: Path) -> None:
    async with private(tmp_path, durable=True) as postgres, logs_of(postgres.url) as logs:
        jobs = Jobs({"the sequencer": (0.05, logs.sequencer.integrate)})
        jobs.start()
        workspace_id = await _settled(logs, uuid4(), 3)
        await logs.sql.close()
        async with postgres.stopped():
            await asyncio.sleep(0.2)
        logs.sql = await asyncpg.connect(postgres.url)
        await _settled(logs, workspace_id, 4)
        async with postgres.crashed():
            await asyncio.sleep(0.1)
        logs.sql = await asyncpg.connect(postgres.url)
        await _settled(logs, workspace_id, 5)
        assert await assert_sound(logs.sql, signer=logs.signer) == 12
        await logs.write(workspace_id, 200)
        async with postgres.frozen():
            await asyncio.sleep(0.1)
            async with asyncio.timeout(8):
                await jobs.stop()
        await logs.another().integrate()  # what was left is the next one's
        assert await assert_sound(logs.sql, signer=logs.signer) == 212


async def _settled(logs: Logs, workspace_id: UUID, count: int) -> UUID:
    """So many more events of the workspace are in its log."""
    await logs.write(workspace_id, count)

    async def done() -> Any:
        return not await logs.waiting(workspace_id)

    await eventually(done)
    return workspace_id
