"""Whatever happens in whatever order: what must always hold of executions holds."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from relay_grpc.actions.attempts import Attempts
from relay_grpc.actions.execution import State
from tests.faults.example import World
from tests.faults.history import NOTE, Step, illegal
from tests.faults.machine import Executions
from tests.harness import Databases, running, settings_for
from tests.rpc.wire import wired

ATTEMPT_SECONDS = 0.2


@pytest.fixture
async def world(databases: Databases, tmp_path: Path) -> AsyncIterator[World]:
    environ = {
        "RELAY_ATTEMPT_TIMEOUT": str(ATTEMPT_SECONDS),
        "RELAY_LEASE": "30",
        "RELAY_RETRY_FLOOR": "0",
        "RELAY_BREAKER_PAUSE": "3600",
    }
    async with (
        databases.new() as url,
        running(url, settings_for(tmp_path, **environ)) as relay,
        wired(relay) as wire,
        asyncpg.create_pool(url, min_size=1, max_size=4) as postgres,
    ):
        await postgres.execute(NOTE)
        yield World(relay, wire, postgres, asyncio.get_running_loop())


async def run_machine(world: World, examples: int, steps: int) -> None:
    """Runs that many examples of at most that many steps. Raises what the first one that fails raised."""
    Executions.world = world
    await asyncio.to_thread(
        run_state_machine_as_test,
        Executions,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=(Phase.generate,),  # timing decides too, so that a shorter example proves little
            database=None,
            deadline=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.long
async def test_executions_keep_their_promises(world: World, long: bool, figure: Callable[[str], None]) -> None:
    started = time.monotonic()
    await run_machine(world, *((200, 50) if long else (8, 25)))
    seen = ", ".join(f"{count} {what}" for what, count in world.seen.items())
    figure(f"{seen}; {time.monotonic() - started:.0f} s")


async def test_an_attempt_that_sends_twice_is_found_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Attempts.make

    async def twice(self: Attempts, row: Any) -> Any:
        await make(self, row)
        return await make(self, row)

    monkeypatch.setattr(Attempts, "make", twice)
    with pytest.raises(AssertionError, match="an attempt was sent twice"):
        await run_machine(world, 50, 10)


PENDING = Step(UUID(int=1), 1, State.PENDING, 0, 0, 0, None, False)
LEASED = PENDING._replace(revision=2, status=State.EXECUTING, attempts=1, lease=UUID(int=2))
FAILED = LEASED._replace(revision=3, status=State.FAILED, lease=None)
RESENT = FAILED._replace(revision=4, status=State.PENDING, before=1, resends=1)


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([PENDING, LEASED, FAILED, RESENT], ""),
        ([LEASED], "it began as"),
        ([PENDING, LEASED._replace(revision=3)], "a change was not counted"),
        ([PENDING, LEASED, FAILED, RESENT._replace(resends=0, before=0)], "an end was left without a resend"),
        ([PENDING, LEASED._replace(resends=1)], "it was resent before it ended"),
        ([PENDING, PENDING._replace(revision=2, status=State.SUCCESS)], "there is no way"),
        ([PENDING, LEASED._replace(attempts=2)], "an attempt was not counted"),
        ([PENDING, LEASED, LEASED._replace(revision=3, lease=UUID(int=3))], "a second lease of one attempt"),
        ([PENDING, LEASED, FAILED._replace(lease=UUID(int=2))], "a lease without an attempt"),
        ([PENDING._replace(attempts=4)], "more than 3 attempts"),
    ],
)
def test_what_must_not_happen_to_an_execution_is_found_out(steps: list[Step], found: str) -> None:
    told = list(illegal(steps, 3))
    assert all(one.startswith(found) for one in told)
    assert bool(told) == bool(found)
