"""Look-ups of one kind share queries: one at a time, with all that was asked while the last one ran."""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

import pytest

from relay_grpc import errors
from relay_grpc.auth.lookups import MAX_BATCH, Lookups
from tests.harness import Relay


class Table:
    """Squares of numbers, from the database; nothing of negative ones. batches: what each query asked for."""

    def __init__(self) -> None:
        self.batches: list[set[int]] = []

    async def read(self, connection: Any, wanted: Collection[int]) -> Mapping[int, int]:
        self.batches.append(set(wanted))
        rows = await connection.fetch(
            "SELECT n, n * n AS square FROM unnest($1::int[]) AS n WHERE n >= 0", list(wanted)
        )
        return {row["n"]: row["square"] for row in rows}


async def test_what_is_asked_while_a_query_runs_goes_out_together_and_once(relay: Relay) -> None:
    table = Table()
    lookups = Lookups(relay.app.db, table.read)
    first = asyncio.create_task(lookups.find(1))
    while not table.batches:
        await asyncio.sleep(0)
    found = await asyncio.gather(*(lookups.find(n) for n in (1, 2, 3, 2, -1)))
    assert [one.row for one in found] == [1, 4, 9, 4, None]
    assert table.batches == [{1}, {1, 2, 3, -1}]  # 1 again: it was asked after the query had begun
    assert (await first).row == 1
    assert (await first).read_at < found[0].read_at


async def test_a_query_has_a_bounded_size(relay: Relay) -> None:
    table = Table()
    lookups = Lookups(relay.app.db, table.read)
    found = await asyncio.gather(*(lookups.find(n) for n in range(2 * MAX_BATCH + 1)))
    assert [one.row for one in found] == [n * n for n in range(2 * MAX_BATCH + 1)]
    assert [len(batch) for batch in table.batches] == [MAX_BATCH, MAX_BATCH, 1]


async def test_a_failure_is_everybodys_and_the_next_is_tried_anew(relay: Relay) -> None:
    table = Table()
    lookups = Lookups(relay.app.db, table.read)
    outcomes = await asyncio.gather(
        *(lookups.find(n) for n in range(MAX_BATCH)),
        lookups.find(2**40),  # no int, in the second query
        lookups.find(5),
        return_exceptions=True,
    )
    assert [one for one in outcomes if isinstance(one, BaseException)] == outcomes[MAX_BATCH:-1]
    assert (await lookups.find(7)).row == 49


async def test_a_caller_that_goes_away_takes_nobody_with_it(relay: Relay) -> None:
    lookups = Lookups(relay.app.db, Table().read)
    first, second = (asyncio.create_task(lookups.find(3)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).row == 9


async def test_who_waits_at_the_end_is_told_so(relay: Relay) -> None:
    async def never(*_: Any) -> Mapping[int, int]:
        await asyncio.Event().wait()
        return {}

    lookups = Lookups(relay.app.db, never)
    waiting = [asyncio.create_task(lookups.find(n)) for n in range(2)]
    await asyncio.sleep(0.01)
    await lookups.close()
    for task in waiting:
        with pytest.raises(errors.Overloaded):
            await task
