"""Group commit on a real database: in order, in batches, each item answered for itself, through failures and stops."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from relay_grpc import errors
from relay_grpc.db import Database
from relay_grpc.groupcommit import MAX_BATCH, GroupCommit
from relay_grpc.telemetry import Metrics
from tests.actions.caller import eventually
from tests.harness import Databases, OnDatabase

QUEUE = "test"
CUT = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE application_name ~ 'worker' AND datname = current_database()
"""


class Numbers(OnDatabase):
    """A table of numbers, which refuses negative ones, behind group commit; a flush waits while `gate` is closed."""

    def __init__(self, url: str, db: Database) -> None:
        self.url = url
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.metrics = Metrics()
        self.group: GroupCommit[int, int] = GroupCommit(QUEUE, db, self.metrics, self._flush)

    async def _flush(self, connection: Any, items: Sequence[int]) -> Sequence[int]:
        self.batches.append(list(items))
        await self.gate.wait()
        await connection.execute("INSERT INTO numbers (number) SELECT unnest($1::int[])", items)
        return [-item for item in items]

    def submit(self, item: int) -> "asyncio.Task[int]":
        return asyncio.create_task(self.group.submit(item))

    async def closed(self) -> None:
        """Closes the gate with the item 0 behind it: what is submitted now waits for its turn."""
        self.gate.clear()
        self.submit(0)
        await eventually(lambda: self.batches)

    async def written(self) -> list[int]:
        return [row["number"] for row in await self.sql("SELECT number FROM numbers ORDER BY position")]

    def sample(self, suffix: str) -> float:
        return self.metrics.registry.get_sample_value(f"relay_group_commit_size_{suffix}", {"queue": QUEUE}) or 0


@pytest.fixture(scope="module")
async def url(databases: Databases) -> AsyncIterator[str]:
    async with databases.new() as made:
        connection = await asyncpg.connect(made)
        await connection.execute("CREATE TABLE numbers (position serial, number int CHECK (number >= 0))")
        await connection.execute("GRANT INSERT ON numbers TO relay_worker")
        await connection.execute("GRANT USAGE ON SEQUENCE numbers_position_seq TO relay_worker")
        await connection.close()
        yield made


@asynccontextmanager
async def grouping(url: str) -> AsyncIterator[Numbers]:
    db = await Database.open(url)
    made = Numbers(url, db)
    await made.sql("TRUNCATE numbers")
    try:
        yield made
    finally:
        made.gate.set()
        await made.group.close()
        await db.close()


@pytest.fixture
async def numbers(url: str) -> AsyncIterator[Numbers]:
    async with grouping(url) as made:
        yield made


async def test_alone_an_item_goes_out_at_once(numbers: Numbers) -> None:
    assert [await numbers.group.submit(item) for item in (1, 2)] == [-1, -2]
    assert numbers.batches == [[1], [2]]


async def test_what_arrives_while_a_batch_is_out_goes_together_in_order(numbers: Numbers) -> None:
    await numbers.closed()
    waiting = [numbers.submit(item) for item in range(1, MAX_BATCH + 2)]
    await asyncio.sleep(0.01)
    numbers.gate.set()
    assert await asyncio.gather(*waiting) == [-item for item in range(1, MAX_BATCH + 2)]
    assert [len(batch) for batch in numbers.batches] == [1, MAX_BATCH, 1]
    assert await numbers.written() == list(range(MAX_BATCH + 2))
    assert (numbers.sample("count"), numbers.sample("sum")) == (3, MAX_BATCH + 2)


async def test_under_load_batches_form_by_themselves(numbers: Numbers) -> None:
    async def caller(first: int) -> None:
        for item in range(first, first + 10):
            assert await numbers.group.submit(item) == -item

    await asyncio.gather(*(caller(first) for first in range(0, 500, 10)))
    assert sorted(await numbers.written()) == list(range(500))
    assert numbers.sample("sum") / numbers.sample("count") > 5


async def test_a_bad_item_fails_alone(numbers: Numbers) -> None:
    await numbers.closed()
    waiting = [numbers.submit(item) for item in (1, -2, 3, -4)]
    await asyncio.sleep(0.01)
    numbers.gate.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, asyncpg.CheckViolationError] * 2
    assert await numbers.written() == [0, 1, 3]
    assert await numbers.group.submit(5) == -5


async def test_a_cancelled_item_that_waits_is_withdrawn(numbers: Numbers) -> None:
    await numbers.closed()
    kept, withdrawn = numbers.submit(1), numbers.submit(2)
    await asyncio.sleep(0.01)
    withdrawn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await withdrawn
    numbers.gate.set()
    assert await kept == -1
    assert await numbers.written() == [0, 1]


async def test_all_items_withdrawn_leave_a_queue_that_works(numbers: Numbers) -> None:
    await numbers.closed()
    withdrawn = numbers.submit(1)
    await asyncio.sleep(0.01)
    withdrawn.cancel()
    await asyncio.wait([withdrawn])
    numbers.gate.set()
    assert await numbers.group.submit(2) == -2
    assert await numbers.written() == [0, 2]


async def test_a_cancelled_item_that_is_on_its_way_is_waited_for(numbers: Numbers) -> None:
    numbers.gate.clear()
    submitted = numbers.submit(1)
    await eventually(lambda: numbers.batches)
    submitted.cancel()
    await asyncio.sleep(0.05)
    assert not submitted.done()
    numbers.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await submitted
    assert await numbers.written() == [1]


async def test_close_lets_out_what_has_arrived(url: str) -> None:
    async with grouping(url) as numbers:
        await numbers.group.submit(0)
        arrived = [numbers.submit(item) for item in (1, 2)]
        await asyncio.sleep(0)
        await numbers.group.close()
        assert await asyncio.gather(*arrived) == [-1, -2]
        assert await numbers.written() == [0, 1, 2]


async def test_after_close_items_are_refused_as_retryable(url: str) -> None:
    async with grouping(url) as numbers:
        await numbers.group.close()
        with pytest.raises(errors.Overloaded) as refusal:
            await numbers.group.submit(1)
        assert refusal.value.retry_after
        assert not await numbers.written()


async def test_close_gives_up_on_a_batch_that_hangs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_grpc.groupcommit.CLOSE_SECONDS", 0.2)
    async with grouping(url) as numbers:
        await numbers.closed()
        waiting = numbers.submit(1)
        await asyncio.sleep(0.01)
        await numbers.group.close()
        with pytest.raises(errors.Overloaded):
            await waiting
        assert not await numbers.written()


async def test_a_lost_connection_is_told_and_replaced(numbers: Numbers) -> None:
    for item in (1, 3):
        numbers.gate.clear()
        numbers.batches.clear()
        on_its_way = numbers.submit(item)
        await eventually(lambda: numbers.batches)
        await numbers.sql(CUT)
        numbers.gate.set()
        with pytest.raises(errors.DependencyUnavailable) as refusal:
            await on_its_way
        assert refusal.value.retry_after
        assert await again(numbers, item + 1) == -item - 1
    assert await numbers.written() == [2, 4]


async def again(numbers: Numbers, item: int) -> int:
    """As a client does it: the pool may have had a second connection that was cut too."""
    try:
        return await numbers.group.submit(item)
    except errors.DependencyUnavailable:
        return await numbers.group.submit(item)


async def test_a_connection_that_was_lost_in_the_meantime_is_replaced_unnoticed(numbers: Numbers) -> None:
    for item in range(3):
        assert await numbers.group.submit(item) == -item
        await numbers.sql(CUT)
        await asyncio.sleep(0.05)
    assert await numbers.written() == [0, 1, 2]


async def test_a_database_that_takes_no_connections_for_a_while_is_told_and_found_again(numbers: Numbers) -> None:
    """As during maintenance: PostgreSQL answers, and its answer is an error of no class that means "unavailable"."""
    await numbers.group.submit(0)
    name = (await numbers.sql("SELECT current_database() AS name"))[0]["name"]
    elsewhere = await asyncpg.connect(numbers.url.replace(name, "relay"))
    try:
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await elsewhere.fetch("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        for _ in range(3):
            with pytest.raises(errors.DependencyUnavailable):
                await asyncio.wait_for(numbers.group.submit(1), 5)
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    finally:
        await elsewhere.close()
    assert await numbers.group.submit(2) == -2


async def test_it_closes_though_the_end_of_a_connection_swallows_its_cancellation(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_grpc.groupcommit.CLOSE_SECONDS", 0.1)
    flushing = asyncio.Event()

    async def lose_the_cancellation(_connection: Any, _items: Sequence[int]) -> Sequence[int]:
        flushing.set()
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            raise ConnectionResetError from None
        return []

    async with databases.new() as url:
        db = await Database.open(url)
        group: GroupCommit[int, int] = GroupCommit(QUEUE, db, Metrics(), lose_the_cancellation)
        item = asyncio.create_task(group.submit(1))
        await flushing.wait()
        async with asyncio.timeout(5):
            await group.close()
        with pytest.raises(errors.RelayError):
            await item
        await db.close()
