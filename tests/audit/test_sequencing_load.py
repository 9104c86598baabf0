"""What the sequencer costs those who write, and how long their events wait for a place."""

import asyncio
import statistics
import time
from collections.abc import Callable
from uuid import UUID, uuid4

import asyncpg
import pytest

from relay_grpc.audit import sequencer, store, tree_store
from relay_grpc.audit.event import Event
from relay_grpc.jobs import Jobs
from relay_grpc.telemetry import Metrics
from tests.audit.sequencing import Logs, assert_sound, logs_of
from tests.harness import Databases, Receiver, Relay

WRITERS = 50
WORKSPACES = 5


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_writers_hardly_notice_it_and_events_have_their_places_soon(
    databases: Databases, long: bool, figure: Callable[[str], None]
) -> None:
    """Rounds with the sequencer and without it in turns; each writer commits every event for itself, and does no more.

    The worst case: the process and its Postgres have nothing to do but events. What callers notice is the next test's.
    """
    each, pairs = (200, 7) if long else (30, 5)
    workspaces = [uuid4() for _ in range(WORKSPACES)]
    async with databases.new() as url, logs_of(url) as logs:
        await write(logs, workspaces, 2)  # connections are made, statements prepared
        with_it, without = [], []
        for pair in range(pairs):
            for sequenced in (True, False) if pair % 2 else (False, True):
                rounds = with_it if sequenced else without
                rounds.append(await round_of(logs, workspaces, each, sequenced=sequenced))
        events = WRITERS * (2 + 2 * pairs * each)
        assert await assert_sound(logs.sql, signer=logs.signer) == events
        lag = p99(logs)
    took, cpu = ([base[n] / added[n] for base, added in zip(without, with_it, strict=True)] for n in (0, 1))
    rate, share = statistics.median(took), statistics.median(cpu)
    figure(
        f"{WRITERS} writers, {each} events each, {pairs} rounds with it and {pairs} without: {rate:.2f} of the rate "
        f"without it ({', '.join(f'{one:.2f}' for one in took)}), {share:.2f} by this process's CPU; "
        f"{WRITERS * each / statistics.median(seconds for seconds, _ in with_it):,.0f} events/s; "
        f"lag p99 below {lag} s; {events} events, 0 gaps, 0 forks"
    )
    assert rate >= (0.7 if long else 0.5)  # rounds of a second are at the mercy of whatever else runs
    assert share >= 0.7
    assert lag <= 2


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_callers_hardly_notice_it(
    relay: Relay, receiver: Receiver, long: bool, figure: Callable[[str], None]
) -> None:
    """The same with calls that write an event each, through the API. Whoever holds its lock keeps the sequencer off."""
    each, pairs = (200, 5) if long else (10, 3)
    tenant = await relay.new_tenant()
    holder = await asyncpg.connect(relay.url)

    async def waiting() -> bool:
        return bool(await holder.fetchval("SELECT EXISTS (SELECT FROM audit_pending)"))

    with_it, without = [], []
    async with relay.connect(tenant.developer) as client, relay.connect(tenant.admin) as admin:
        await admin.connections.create_webhook("target", receiver.url, default=True)

        async def writer() -> None:
            for _ in range(each):
                await client.actions.preview("webhook.send", {"payload": {}})

        await asyncio.gather(*(client.actions.preview("webhook.send", {"payload": {}}) for _ in range(WRITERS)))
        for pair in range(pairs):
            for sequenced in (True, False) if pair % 2 else (False, True):
                while await waiting():
                    await asyncio.sleep(0.05)
                if not sequenced:
                    await holder.execute("SELECT pg_advisory_lock($1)", tree_store.SEQUENCER_LOCK)
                started = time.perf_counter()
                await asyncio.gather(*(writer() for _ in range(WRITERS)))
                (with_it if sequenced else without).append(time.perf_counter() - started)
                if not sequenced:
                    await holder.execute("SELECT pg_advisory_unlock($1)", tree_store.SEQUENCER_LOCK)
        while await waiting():
            await asyncio.sleep(0.05)
        indices = await holder.fetch(
            "SELECT leaf_index FROM audit_leaves WHERE workspace_id = $1 ORDER BY 1", tenant.workspace_id
        )
    await holder.close()
    assert [row["leaf_index"] for row in indices] == list(range(len(indices)))
    assert len(indices) > 2 * pairs * WRITERS * each
    took = [base / added for base, added in zip(without, with_it, strict=True)]
    figure(
        f"{WRITERS} callers, {each} Previews each, {pairs} rounds with it and {pairs} without: "
        f"{statistics.median(took):.2f} of the rate without it ({', '.join(f'{one:.2f}' for one in took)}); "
        f"{WRITERS * each / statistics.median(with_it):,.0f} calls/s; {len(indices)} events, 0 gaps, 0 forks"
    )
    assert statistics.median(took) >= (0.9 if long else 0.5)


async def round_of(logs: Logs, workspaces: list[UUID], each: int, *, sequenced: bool) -> tuple[float, float]:
    """Seconds that it took to write so many events, and of CPU until they had their places, where they get them."""
    jobs = Jobs({"the sequencer": (sequencer.INTERVAL, logs.sequencer.integrate)} if sequenced else {})
    cpu = time.process_time()
    jobs.start()
    took = await write(logs, workspaces, each)

    while sequenced and await logs.sql.fetchval("SELECT EXISTS (SELECT FROM audit_pending)"):
        await asyncio.sleep(0.2)  # seldom: it is part of the CPU
    await jobs.stop()
    cpu = time.process_time() - cpu
    await logs.another(Metrics()).integrate()  # the others', whose lag counts for nothing
    return took, cpu


async def write(logs: Logs, workspaces: list[UUID], each: int) -> float:
    """Seconds that the writers took together."""

    async def writer(workspace_id: UUID) -> None:
        for _ in range(each):
            async with logs.db.workspace(workspace_id) as connection:
                await store.insert(connection, [Event(workspace_id, "test.Happened", actor_id="somebody", peer="::1")])

    started = time.perf_counter()
    await asyncio.gather(*(writer(workspaces[n % len(workspaces)]) for n in range(WRITERS)))
    return time.perf_counter() - started


def p99(logs: Logs) -> float:
    """The edge of the histogram below which 99% of the events had their places."""
    name = "relay_audit_integration_seconds"
    buckets = {
        float(sample.labels["le"]): sample.value
        for metric in logs.metrics.registry.collect()
        if metric.name == name
        for sample in metric.samples
        if sample.name == f"{name}_bucket"
    }
    return min(edge for edge, count in buckets.items() if count >= 0.99 * buckets[float("inf")])


async def test_a_thousand_logs_are_extended_side_by_side(databases: Databases, figure: Callable[[str], None]) -> None:
    """One event in each of many logs, the most that a batch can cost."""
    async with databases.new() as url, logs_of(url) as logs:
        workspaces = [uuid4() for _ in range(1000)]
        for _ in range(2):
            await store.insert(logs.sql, [Event(id_, "test.Happened") for id_ in workspaces])
            started = time.perf_counter()
            await logs.integrate()
            took = time.perf_counter() - started
        assert await assert_sound(logs.sql, signer=logs.signer) == 2000
    figure(f"an event in each of 1,000 logs: {took:.2f} s, {1000 / took:,.0f} logs/s")
