"""Upkeep as it runs by itself: lateness is told, and each job goes on whatever befalls another."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from relay_grpc.actions import upkeep
from relay_grpc.actions.upkeep import Upkeep
from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.db import Database
from relay_grpc.telemetry import Metrics
from tests.actions.caller import eventually
from tests.harness import Databases

CUT = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE application_name ~ 'worker' AND datname = current_database()
"""


class Instance:
    """Upkeep on a database, without a server around it."""

    def __init__(self, sql: asyncpg.Connection, db: Database) -> None:
        self.sql = sql
        self.metrics = Metrics()
        self.upkeep = Upkeep(db, self.metrics, retention=timedelta(hours=76))

    async def lateness(self) -> float:
        """As it is told next."""

        def told() -> float:
            return self.metrics.registry.get_sample_value("relay_oldest_due_seconds") or 0

        self.metrics.oldest_due.set(-1)
        await eventually(lambda: told() >= 0)
        return told()

    async def connection(self) -> UUID:
        id_ = uuid4()
        await self.sql.execute("INSERT INTO workspaces (id, name) VALUES ($1, $2)", id_, str(id_))
        await self.sql.execute(
            "INSERT INTO connections (id, workspace_id, name, provider, configuration)"
            " VALUES ($1, $1, 'a', 'independent', '{}')",
            id_,
        )
        return id_

    async def pending(self, connection_id: UUID, seconds: float) -> None:
        """An execution that is due since so many seconds."""
        await self.sql.execute(
            """
            INSERT INTO action_executions
              (id, workspace_id, caller, idempotency_key, fingerprint, preview_id, provider, action_type,
               action_version, connection_id, parameters, traceparent, status, delivery, next_attempt_at)
            VALUES (gen_random_uuid(), $1, '', gen_random_uuid(), '', gen_random_uuid(), 'independent', 'webhook.send',
                    1, $1, '{}', '', 'pending', 'at_least_once', now() - $2 * interval '1 second')
            """,
            connection_id,
            seconds,
        )

    async def old_preview(self, connection_id: UUID) -> None:
        await self.sql.execute(
            """
            INSERT INTO previews
              (id, workspace_id, caller, provider, action_type, action_version, connection_id, connection_version,
               parameters, params_hash, params_prefix, digest, fingerprint, shown, expires_at)
            VALUES ($1, $1, '', 'independent', 'webhook.send', 1, $1, 1, '{}', '', '', '', '', '{}',
                    now() - interval '2 days')
            """,
            connection_id,
        )

    async def is_cleared(self) -> bool:
        return not await self.sql.fetchval("SELECT count(*) FROM previews")


@pytest.fixture
async def instance(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Instance]:
    for job in ("RECOVERIES", "RETENTION", "LATENESS"):
        monkeypatch.setattr(upkeep, f"{job}_SECONDS", 0.02)
    async with databases.new() as url:
        db, sql = await Database.open(url), await asyncpg.connect(url)
        made = Instance(sql, db)
        made.upkeep.start()
        yield made
        async with asyncio.timeout(5):
            await made.upkeep.stop()
        await sql.close()
        await db.close()


async def test_lateness_is_that_of_the_oldest_which_nothing_holds_back(instance: Instance) -> None:
    first, second = await instance.connection(), await instance.connection()
    await instance.pending(first, -60)
    assert await instance.lateness() == 0, "it is due in a minute"
    for connection, late in ((first, 100), (first, 200), (second, 50)):
        await instance.pending(connection, late)
    assert 200 <= await instance.lateness() < 230
    change = "UPDATE connections SET failures = 10, failing_since = now(), open_until = now() + $2 WHERE id = $1"
    await instance.sql.execute(change, first, timedelta(hours=1))
    assert 50 <= await instance.lateness() < 80, "the breaker of the other is open"
    await instance.sql.execute(change, first, timedelta(hours=-1))
    assert await instance.lateness() >= 200, "it is half open: a probe is due"
    await instance.sql.execute("INSERT INTO halts (workspace_id, provider, reason) VALUES ($1, '', 'a test')", first)
    assert 50 <= await instance.lateness() < 80
    await instance.sql.execute(
        "UPDATE connections SET enabled = false, disabled_reason = 'a test' WHERE id = $1", second
    )
    assert await instance.lateness() == 0
    await instance.sql.execute("DELETE FROM halts")
    assert await instance.lateness() >= 200
    await instance.sql.execute(
        "INSERT INTO halts (workspace_id, provider, reason) VALUES ($1, 'independent', 'a test')", SYSTEM_WORKSPACE
    )
    assert await instance.lateness() == 0


async def test_a_job_that_fails_stops_no_other_and_is_tried_again(
    instance: Instance, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = 0

    async def break_down(_: object) -> list[UUID]:
        nonlocal tried
        tried += 1
        raise RuntimeError("a defect")

    connection = await instance.connection()
    monkeypatch.setattr(upkeep.recovery_store, "under_way", break_down)
    await eventually(lambda: tried > 2)
    await instance.old_preview(connection)
    await eventually(instance.is_cleared)
    assert "a defect" in caplog.text
    assert await instance.lateness() == 0


async def test_it_goes_on_when_the_database_is_back(instance: Instance) -> None:
    connection = await instance.connection()
    for _ in range(3):
        await instance.sql.execute(CUT)
        await instance.old_preview(connection)
        await eventually(instance.is_cleared)
        assert await instance.lateness() == 0
