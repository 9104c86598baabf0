"""Old months go at once, while servers go on; what is kept is still proven, and what is gone is told."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from relay.proofs import ProofError, canonical, leaf_hash, verify_consistency, verify_inclusion

from relay_grpc.audit import retention, tree_store
from relay_grpc.audit.event import Event, leaf_of
from relay_grpc.audit.merkle import Tree, consistency, inclusion, tiles_of
from relay_grpc.audit.places import DROP, FIRST_KEPT
from relay_grpc.audit.retention import KEPT_MONTHS, Refused, newest_boundary
from tests.audit.log import (
    assert_proven,
    event_at,
    export_of,
    held_of,
    integrated,
    log_events,
    newest,
    verified,
)
from tests.harness import Databases, Relay, Tenant, running, settings_for
from tests.processes import ROOT

TABLES = ("audit_logs", "audit_values", "audit_leaves")


def month(ago: int) -> datetime:
    """When the month began that is so many before this one."""
    now = datetime.now(UTC)
    months = now.year * 12 + now.month - 1 - ago
    return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)


@pytest.fixture
async def relay(databases: Databases, data_dir: Path) -> AsyncIterator[Relay]:
    async with databases.new() as url, running(url, settings_for(data_dir)) as server:
        yield server


@pytest.fixture
async def connection(relay: Relay) -> AsyncIterator[Any]:
    made = await asyncpg.connect(relay.url)
    yield made
    await made.close()


def happened(tenant: Tenant, ago: int, count: int) -> list[Event]:
    """Events of a month."""
    first = month(ago) + timedelta(days=2)
    return [
        event_at(first + timedelta(minutes=n), tenant.workspace_id, actor_id=f"actor {n}", request_id=str(n))
        for n in range(count)
    ]


async def log_months(relay: Relay, tenant: Tenant, *months: tuple[int, int]) -> None:
    """months: how long ago, and how many events; each has its place before the next comes."""
    await integrated(relay)
    for ago, count in months:
        await log_events(relay.url, happened(tenant, ago, count))
        await integrated(relay)


async def told(connection: Any, tenant: Tenant) -> list[tuple[str, str]]:
    """Reason and note of the events that tell of a loss, oldest first."""
    rows = await connection.fetch(
        "SELECT reason, note FROM audit_events WHERE workspace_id = $1 AND action = $2 ORDER BY id",
        tenant.workspace_id,
        DROP,
    )
    return [(row["reason"], row["note"]) for row in rows]


async def test_what_is_kept_is_proven_and_what_is_gone_is_told(relay: Relay, connection: Any) -> None:
    tenant, other, quiet = [await relay.new_tenant() for _ in range(3)]
    await integrated(relay)
    before_all = (await newest(connection, tenant.workspace_id))[0]
    await log_months(relay, tenant, (6, 300), (5, 20), (4, 10), (1, 7))
    await log_months(relay, other, (5, 4))
    held = await newest(connection, tenant.workspace_id)  # somewhere outside
    everything = await assert_proven(connection, tenant.workspace_id)
    log_of_quiet = await newest(connection, quiet.workspace_id)

    boundary = month(4).date()
    dropped = await retention.drop(relay.url, boundary)
    await integrated(relay)
    assert dropped.months == [f"{month(6):%Y-%m}", f"{month(5):%Y-%m}"]
    assert dropped.size > 3 * 8192
    losses = {loss.workspace_id: loss for loss in dropped.losses}
    assert losses.keys() == {tenant.workspace_id, other.workspace_id}
    first_kept = before_all + 320
    assert (losses[tenant.workspace_id].events, losses[tenant.workspace_id].first_kept) == (320, first_kept)
    assert losses[other.workspace_id].events == 4

    kept = await assert_proven(connection, tenant.workspace_id)
    gone = everything.keys() - kept.keys()
    assert {everything[id_]["created_at"] < month(4) for id_ in gone} == {True}
    assert len(gone) == 320
    for table in TABLES:
        key = "event_id" if table == "audit_leaves" else "id"
        assert not await connection.fetchval(f"SELECT count(*) FROM {table} WHERE {key} = ANY($1)", list(gone))
    assert await told(connection, tenant) == [(f"{FIRST_KEPT}{first_kept}", f"months before {boundary:%Y-%m}")]
    assert await told(connection, quiet) == []
    assert (await newest(connection, quiet.workspace_id)) == log_of_quiet

    # What was held outside is a prefix of the log as it is, and an event that is gone still has its proof.
    size, root = await newest(connection, tenant.workspace_id)
    assert size == held[0] + 1
    for first in (held, (1, leaf_hash(canonical(leaf_of(min(everything.values(), key=leaf_index)))))):
        ranges = consistency(first[0], size)
        tree = await read_tree(connection, tenant, ranges)
        verify_consistency(first[0], size, first[1], root, [tree.hash(*range_) for range_ in ranges])
    lost = everything[min(gone)]
    ranges = inclusion(lost["leaf_index"], size)
    tree = await read_tree(connection, tenant, ranges)
    path = [tree.hash(*range_) for range_ in ranges]
    verify_inclusion(lost["leaf_index"], size, leaf_hash(canonical(leaf_of(lost))), path, root)

    sizes = await connection.fetch(
        "SELECT tree_size FROM audit_checkpoints WHERE workspace_id = $1 ORDER BY 1", tenant.workspace_id
    )
    assert sizes[0]["tree_size"] == first_kept, "older ones say when something was logged that is gone"
    assert sizes[-1]["tree_size"] == size


def leaf_index(row: Any) -> int:
    index: int = row["leaf_index"]
    return index


async def read_tree(connection: Any, tenant: Tenant, ranges: list[tuple[int, int]]) -> Tree:
    tiles = await tree_store.read_tiles(connection, {tenant.workspace_id: tiles_of(ranges)})
    return Tree(tiles[tenant.workspace_id])


async def test_exports_begin_where_the_log_is_whole_and_are_proven(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    await log_months(relay, tenant, (6, 30), (5, 2), (1, 3))
    held, before = await held_of(relay, tenant), await export_of(relay, tenant)
    dropped = await retention.drop(relay.url, month(4).date())
    await integrated(relay)
    first_kept = next(loss.first_kept for loss in dropped.losses if loss.workspace_id == tenant.workspace_id)
    assert (verified(relay, before, held).first, verified(relay, before, held).first_kept) == (0, 0)
    after = await export_of(relay, tenant)
    report = verified(relay, after)
    assert (report.first, report.first_kept) == (first_kept, first_kept)
    assert report.end == report.checkpoint.size
    with pytest.raises(ProofError):  # as if more had been dropped than was told
        verified(relay, after[1:])


async def test_what_was_logged_late_is_kept_or_gone_as_its_month_says(relay: Relay, connection: Any) -> None:
    tenant = await relay.new_tenant()
    await log_months(relay, tenant, (5, 3), (4, 2), (6, 1), (1, 2))  # one of the oldest month came after the next
    size, _ = await newest(connection, tenant.workspace_id)
    await retention.drop(relay.url, month(5).date())
    await integrated(relay)
    assert await told(connection, tenant) == [(f"{FIRST_KEPT}{size - 2}", f"months before {month(5):%Y-%m}")]
    await assert_proven(connection, tenant.workspace_id)
    # What comes next loses leaves that lie before: the log is whole from the same leaf on.
    await retention.drop(relay.url, month(4).date())
    await integrated(relay)
    assert [reason for reason, _ in await told(connection, tenant)] == [f"{FIRST_KEPT}{size - 2}"] * 2
    assert await retention.drop(relay.url, month(4).date()) == retention.Dropped([], 0, [])
    assert len(await told(connection, tenant)) == 2


async def test_months_that_are_young_or_waiting_are_refused(relay: Relay, connection: Any) -> None:
    await log_months(relay, relay.tenant, (KEPT_MONTHS, 2), (KEPT_MONTHS + 1, 2))
    logged = await connection.fetchval("SELECT count(*) FROM audit_events")
    for ago in (KEPT_MONTHS - 1, 1, 0, -1):
        for do in (retention.look, retention.drop):
            with pytest.raises(Refused, match="3 whole months are always kept"):
                await do(relay.url, month(ago).date())
    waiting = happened(relay.tenant, KEPT_MONTHS + 1, 1)[0]
    holder = await asyncpg.connect(relay.url)  # no sequencer may begin meanwhile
    await holder.execute("SELECT pg_advisory_lock($1)", tree_store.SEQUENCER_LOCK)
    await log_events(relay.url, [waiting])
    with pytest.raises(Refused, match="no place in the log yet"):
        await retention.drop(relay.url, month(KEPT_MONTHS).date())
    assert await connection.fetchval("SELECT count(*) FROM audit_events") == logged + 1
    await holder.close()
    await integrated(relay)
    await retention.drop(relay.url, month(KEPT_MONTHS).date())
    assert await connection.fetchval("SELECT count(*) FROM audit_logs WHERE id = $1", waiting.id) == 0


def test_the_latest_boundary_is_three_whole_months_back() -> None:
    assert newest_boundary(datetime(2026, 11, 24, tzinfo=UTC)) == date(2026, 8, 1)
    assert newest_boundary(datetime(2026, 4, 1, tzinfo=UTC)) == date(2026, 1, 1)
    assert newest_boundary(datetime(2026, 3, 31, 23, 59, 59, tzinfo=UTC)) == date(2025, 12, 1)


async def test_what_a_missing_month_left_in_default_goes_with_its_month(relay: Relay, connection: Any) -> None:
    """No partition was ever made for it: the events of a database that was filled elsewhere."""
    await log_months(relay, relay.tenant, (8, 5))
    assert await connection.fetchval("SELECT count(*) FROM audit_logs_default") == 5
    dropped = await retention.drop(relay.url, month(7).date())
    assert (dropped.months, [loss.events for loss in dropped.losses]) == ([f"{month(8):%Y-%m}"], [5])
    assert await connection.fetchval("SELECT count(*) FROM audit_logs_default") == 0


async def test_it_reads_no_more_of_a_month_than_where_it_ends(relay: Relay, connection: Any) -> None:
    await log_months(relay, relay.tenant, (5, 4000), (4, 4000))
    await retention.look(relay.url, month(3).date())  # DEFAULT is in its months from now on
    read = """
        SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::int
          FROM pg_stat_xact_user_tables WHERE relname LIKE 'audit\\_%'
    """
    async with connection.transaction():
        found = await retention._look(connection, month(3).date())
        assert sum(loss.events for loss in found.losses) == 8000
        assert 0 < await connection.fetchval(read) < 100


async def test_no_call_fails_while_months_are_dropped(relay: Relay, connection: Any) -> None:
    await log_months(relay, relay.tenant, *((ago, 500) for ago in range(4, 10)))
    await retention.look(relay.url, month(3).date())
    done, stopped = 0, asyncio.Event()
    async with relay.connect(relay.tenant.admin) as client:

        async def work(name: int) -> None:
            nonlocal done
            while not stopped.is_set():
                await client.auth.create_api_key(f"key of {name}", "viewer")
                async with relay.app.db.workspace(relay.tenant.workspace_id) as reader:
                    await reader.fetch("SELECT FROM audit_events ORDER BY id DESC LIMIT 5")  # in all months
                done += 1

        workers = [asyncio.create_task(work(name)) for name in range(8)]
        for ago in range(8, 2, -1):
            assert len((await retention.drop(relay.url, month(ago).date())).months) == 1
            await asyncio.sleep(0.1)
        stopped.set()
        await asyncio.gather(*workers)  # none of them failed
    assert done > 20
    await integrated(relay)
    await assert_proven(connection, relay.tenant.workspace_id)
    assert len(await told(connection, relay.tenant)) == 6


async def test_of_those_who_drop_at_the_same_time_one_does_it(relay: Relay, connection: Any) -> None:
    await log_months(relay, relay.tenant, (6, 20), (5, 20))
    await retention.look(relay.url, month(4).date())  # DEFAULT is in its months from now on
    dropped = await asyncio.gather(*(retention.drop(relay.url, month(4).date()) for _ in range(4)))
    assert sorted(len(one.months) for one in dropped) == [0, 0, 0, 2]
    assert len(await told(connection, relay.tenant)) == 1


async def test_the_command_shows_what_it_drops_and_asks(relay: Relay, tmp_path: Path) -> None:
    await log_months(relay, relay.tenant, (5, 6))

    async def command(*arguments: str, stdin: bytes = b"") -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "relay_grpc", "audit", "drop", "--data-dir", str(tmp_path), *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "DATABASE_URL": relay.url, "COLUMNS": "200"},
            cwd=ROOT,
        )
        out, err = await process.communicate(stdin)
        return process.returncode, out.decode(), err.decode()

    before = f"{month(4):%Y-%m}"
    asked = [(before,), (f"{month(4):%Y-%m-%d}", "--yes"), (f"{month(2):%Y-%m}", "--yes")]
    refused = await asyncio.gather(*(command("--before", *arguments) for arguments in asked))
    for (code, _, err), expected in zip(
        refused, [(2, "give --yes"), (2, "should be a month"), (5, "are always kept")], strict=True
    ):
        assert (code, expected[1] in err) == (expected[0], True), err
    code, out, err = await command("--before", before, "--yes", "--json")
    assert code == 0, err
    assert "FIRST LEAF THAT IS KEPT" in err
    document = json.loads(out)
    assert document["months"] == [f"{month(5):%Y-%m}"]
    assert [(loss["workspace"], loss["events"]) for loss in document["workspaces"]] == [("default", 6)]
    assert await command("--before", before, "--yes") == (0, f"There is nothing before {before}.\n", "")
