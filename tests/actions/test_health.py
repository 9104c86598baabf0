"""The health of connections on a real database: what is noted of attempts is written down, together and in order."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiohttp import web
from relay.errors import FailedPrecondition
from relay.v1 import actions_pb2

from relay_grpc.actions.execution import AttemptResult, Outcome
from relay_grpc.actions.health import Health
from relay_grpc.app import serving
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.telemetry import Metrics
from tests.actions.caller import answering, calling, eventually, received
from tests.harness import Databases, Receiver, running, settings_for

PAUSE = 30.0
SUCCESS = AttemptResult(Outcome.SUCCESS, status_code=200)
REFUSED = AttemptResult(Outcome.REFUSED, status_code=500)
GONE = AttemptResult(Outcome.REFUSED, status_code=410)
CONFIGURATION = '{"url": "https://receiver.test"}'


@dataclass
class Clinic:
    """Health on a database of its own, without a server around it."""

    sql: asyncpg.Connection
    health: Health
    metrics: Metrics
    workspace_id: UUID

    async def connection(self) -> UUID:
        return UUID(
            str(
                await self.sql.fetchval(
                    "INSERT INTO connections (id, workspace_id, name, provider, configuration)"
                    " VALUES ($1, $2, $3, 'independent', $4) RETURNING id",
                    uuid7(),
                    self.workspace_id,
                    f"receiver {uuid4()}",
                    CONFIGURATION,
                )
            )
        )

    def note(self, id_: UUID, result: AttemptResult, times: int = 1, **leased: Any) -> None:
        """leased: what the connection's row said when the attempts were leased, if not that it was well."""
        row = {"connection_id": id_, "configuration": CONFIGURATION, "failures": 0, "open_until": None} | leased
        for _ in range(times):
            self.health.note(row, result)

    async def row(self, id_: UUID) -> Any:
        return await self.sql.fetchrow("SELECT *, now() AS now FROM connections WHERE id = $1", id_)

    async def writes(self, id_: UUID) -> str:
        """What changes whenever the row is written."""
        return str(await self.sql.fetchval("SELECT xmin::text || ctid FROM connections WHERE id = $1", id_))

    async def until(self, id_: UUID, look: Callable[[Any], object]) -> Any:
        """The connection's row, once it is so."""

        async def so() -> Any:
            row = await self.row(id_)
            return row if look(row) else None

        return await eventually(so)

    async def events(self, id_: UUID) -> list[tuple[str, str]]:
        rows = await self.sql.fetch(
            "SELECT action, reason FROM audit_events WHERE workspace_id = $1 AND target = $2 ORDER BY created_at, id",
            self.workspace_id,
            f"connections/{id_}",
        )
        return [(row["action"], row["reason"]) for row in rows]

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0


@asynccontextmanager
async def clinic_on(url: str) -> AsyncIterator[Clinic]:
    db, metrics, sql = await Database.open(url), Metrics(), await asyncpg.connect(url)
    health = Health(db, metrics, pause=PAUSE)
    try:
        workspace_id = uuid4()
        await sql.execute("INSERT INTO workspaces (id, name) VALUES ($1, $2)", workspace_id, str(workspace_id))
        yield Clinic(sql, health, metrics, workspace_id)
    finally:
        await health.close()
        await sql.close()
        await db.close()


@pytest.fixture(scope="module")
async def url(databases: Databases) -> AsyncIterator[str]:
    async with databases.new() as made:
        yield made


@pytest.fixture
async def clinic(url: str) -> AsyncIterator[Clinic]:
    async with clinic_on(url) as made:
        yield made


async def test_ten_failures_open_the_breaker_and_a_success_closes_it(clinic: Clinic) -> None:
    id_ = await clinic.connection()
    clinic.note(id_, REFUSED, 9)
    row = await clinic.until(id_, lambda row: row["failures"] == 9)
    assert (row["open_until"], row["enabled"], row["version"]) == (None, True, 1)
    assert row["failing_since"] <= row["now"]
    clinic.note(id_, REFUSED, 30)
    row = await clinic.until(id_, lambda row: row["failures"] == 10)
    assert timedelta(seconds=PAUSE - 10) < row["open_until"] - row["now"] <= timedelta(seconds=PAUSE)
    clinic.note(id_, SUCCESS, failures=10, open_until=row["open_until"])
    row = await clinic.until(id_, lambda row: not row["failures"])
    assert (row["failing_since"], row["probes"], row["open_until"]) == (None, 0, None)
    transitions = [clinic.sample("relay_breaker_transitions_total", to=to) for to in ("open", "closed")]
    assert transitions == [1, 1]
    assert await clinic.events(id_) == []


async def test_failures_up_to_the_hundredth_are_told_of_and_disable_with_their_events(clinic: Clinic) -> None:
    id_ = await clinic.connection()
    clinic.note(id_, REFUSED, 10)
    row = await clinic.until(id_, lambda row: row["open_until"])
    for probes in range(1, 91):
        clinic.note(id_, REFUSED, failures=row["failures"], open_until=row["open_until"])
        row = await clinic.until(id_, lambda row, n=probes: row["probes"] == n)
    assert (row["enabled"], row["failures"], row["version"]) == (False, 100, 1)
    assert row["disabled_reason"] == "100 deliveries in a row failed"
    assert timedelta(minutes=59) < row["open_until"] - row["now"] <= timedelta(hours=1)
    assert await clinic.events(id_) == [
        *[("connection.degraded", step) for step in ("50", "70", "90", "100")],
        ("connection.disabled", "FAILING"),
    ]
    assert clinic.sample("relay_connections_disabled_total", reason="FAILING") == 1


async def test_what_is_noted_together_is_written_together(clinic: Clinic) -> None:
    """A connection that somebody holds, held up; then all at once, and another's at the same time."""
    ids = [await clinic.connection() for _ in range(20)]
    before = clinic.sample("relay_audit_events_total", outcome="failed")
    async with clinic.sql.transaction():
        await clinic.sql.execute("SELECT FROM connections WHERE id = $1 FOR UPDATE", ids[0])
        for _ in range(1000):
            for id_ in ids:
                clinic.note(id_, REFUSED)
        for id_ in ids[10:]:
            clinic.note(id_, GONE)
        await asyncio.sleep(1.5)  # longer than anybody waits for a lock: it is tried again
    for id_ in ids:
        row = await clinic.until(id_, lambda row: row["failures"])
        assert (row["failures"], row["enabled"]) == (10, id_ in ids[:10])
    assert [await clinic.events(id_) for id_ in ids] == [[]] * 10 + [[("connection.disabled", "GONE")]] * 10
    assert clinic.sample("relay_audit_events_total", outcome="failed") - before == 10


async def test_410_disables_at_once_and_what_is_disabled_or_deleted_is_left_alone(clinic: Clinic) -> None:
    gone, disabled, deleted = [await clinic.connection() for _ in range(3)]
    await clinic.sql.execute(
        "UPDATE connections SET enabled = false, disabled_reason = 'mine' WHERE id = ANY($1)", [disabled, deleted]
    )
    await clinic.sql.execute("UPDATE connections SET deleted_at = now() WHERE id = $1", deleted)
    before = [dict(await clinic.row(id_)) | {"now": None} for id_ in (disabled, deleted)]
    for id_ in (disabled, deleted, gone):
        clinic.note(id_, GONE)
    row = await clinic.until(gone, lambda row: not row["enabled"])
    assert row["disabled_reason"] == "the receiver answered 410 Gone"
    assert row["updated_at"] > row["created_at"]
    assert [dict(await clinic.row(id_)) | {"now": None} for id_ in (disabled, deleted)] == before
    assert [await clinic.events(id_) for id_ in (gone, disabled, deleted)] == [
        [("connection.disabled", "GONE")],
        [],
        [],
    ]


async def test_an_attempt_by_an_earlier_configuration_is_not_held_against_the_new_one(clinic: Clinic) -> None:
    id_ = await clinic.connection()
    moved = json.dumps({"url": "https://elsewhere.test"})
    await clinic.sql.execute("UPDATE connections SET configuration = $2, version = 2 WHERE id = $1", id_, moved)
    clinic.note(id_, GONE)
    clinic.note(id_, REFUSED, 3, configuration=moved)
    row = await clinic.until(id_, lambda row: row["failures"])
    assert (row["failures"], row["enabled"]) == (3, True)


async def test_successes_of_what_is_well_write_nothing_and_those_beside_failures_count(clinic: Clinic) -> None:
    """An attempt that was leased before the first failure knows of none, and its success counts all the same."""
    well, mixed = await clinic.connection(), await clinic.connection()
    written = await clinic.writes(well)
    clinic.note(well, SUCCESS, 100)
    clinic.note(mixed, REFUSED, 9)
    await clinic.until(mixed, lambda row: row["failures"] == 9)
    clinic.note(mixed, SUCCESS)
    clinic.note(mixed, REFUSED, 2)
    await clinic.until(mixed, lambda row: row["failures"] == 2)
    assert await clinic.writes(well) == written


async def test_what_is_noted_survives_a_cut_connection_and_is_written_at_the_end(url: str) -> None:
    async with clinic_on(url) as clinic:
        id_ = await clinic.connection()
        async with clinic.sql.transaction():
            await clinic.sql.execute("SELECT FROM connections WHERE id = $1 FOR UPDATE", id_)
            clinic.note(id_, REFUSED, 4)
            waiting = "SELECT pid FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            pid = await eventually(lambda: clinic.sql.fetchval(waiting))
            await clinic.sql.execute("SELECT pg_terminate_backend($1)", pid)
        clinic.note(id_, REFUSED, 3)
    connection = await asyncpg.connect(url)
    assert await connection.fetchval("SELECT failures FROM connections WHERE id = $1", id_) == 7
    await connection.close()


async def test_a_receiver_that_fails_is_left_alone_but_for_probes_and_has_all_of_it_when_it_is_back(
    databases: Databases, receiver: Receiver, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """By two instances: both look for what is due, and neither probes while the other does."""
    settings = settings_for(tmp_path, RELAY_BREAKER_PAUSE="0.4")
    async with (
        databases.new() as url,
        running(url, settings) as relay,
        serving(settings, url),
        calling(relay, receiver) as caller,
    ):
        answering(receiver, 503)
        for _ in range(10):
            assert (await caller.execute(await caller.preview())).state == actions_pb2.EXECUTION_STATE_PENDING

        async def opened() -> Any:
            (row,) = await relay.sql("SELECT open_until FROM connections WHERE id = $1", caller.connection.id)
            return row["open_until"]

        await eventually(opened)
        seen: list[float] = []

        async def take(_: web.Request) -> web.Response:
            seen.append(time.monotonic())
            return web.Response(status=503 if len(seen) < 3 else 200)

        receiver.answer = take
        waiting = await caller.execute(await caller.preview(), wait=0)
        assert (waiting.state, waiting.attempt_count) == (actions_pb2.EXECUTION_STATE_PENDING, 0)
        now = "UPDATE action_executions SET next_attempt_at = now() WHERE status = 'pending'"
        await relay.sql(now)
        await received(receiver, 10 + 2 + 9)
        await relay.sql(now)  # those whose probes failed wait longer
        await received(receiver, 10 + 2 + 11)
        assert (await caller.ended(waiting.id)).state == actions_pb2.EXECUTION_STATE_SUCCESS
        first, second, third, *rest = seen
        figure(f"probes after {second - first:.2f} s and {third - second:.2f} s; the rest in {rest[-1] - third:.2f} s")
        assert second - first > 0.7, "the pause, doubled after the first probe that failed"
        assert third - second > 1.4
        assert len(rest) == 10
        assert not await opened()


async def test_410_ends_the_execution_disables_the_connection_and_holds_what_waits(
    databases: Databases, receiver: Receiver, tmp_path: Path
) -> None:
    async with (
        databases.new() as url,
        running(url, settings_for(tmp_path)) as relay,
        calling(relay, receiver) as caller,
        relay.connect(relay.tenant.admin) as client,
    ):
        answering(receiver, 503)
        waiting = await caller.execute(await caller.preview())
        unused = await caller.preview()
        answering(receiver, 410)
        gone = await caller.execute(await caller.preview())
        assert gone.state == actions_pb2.EXECUTION_STATE_FAILED

        async def disabled() -> Any:
            found = await client.connections.get(caller.connection.id)
            return None if found.enabled else found

        found = await eventually(disabled)
        assert found.disabled_reason == "the receiver answered 410 Gone"
        for refused in (caller.execute(unused), caller.preview()):
            with pytest.raises(FailedPrecondition) as caught:
                await refused
            assert caught.value.reason == "CONNECTION_DISABLED"
        await relay.sql("UPDATE action_executions SET next_attempt_at = now() WHERE status = 'pending'")
        await asyncio.sleep(0.5)  # ten looks of the sweeper
        assert (await caller.get(waiting.id)).state == actions_pb2.EXECUTION_STATE_PENDING
        assert len(receiver.requests) == 2
        events = [event async for event in client.audit.list_events(action="connection.disabled")]
        assert [(event.target, event.reason) for event in events] == [(f"connections/{caller.connection.id}", "GONE")]
        assert events[0].actor.type == 3  # ACTOR_TYPE_SYSTEM

        receiver.answer = None
        await relay.sql(
            "UPDATE connections SET enabled = true, disabled_reason = '' WHERE id = $1", caller.connection.id
        )
        await received(receiver, 3)
        assert (await caller.ended(waiting.id)).state == actions_pb2.EXECUTION_STATE_SUCCESS
