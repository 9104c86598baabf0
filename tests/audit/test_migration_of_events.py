"""The events of a database of the version before: none is lost, and all are proven from then on."""

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from relay_grpc.audit.event import ERASABLE, SALT_BYTES, SYSTEM_WORKSPACE
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.ids import time_of
from relay_grpc.schema import migrate
from tests.audit.log import assert_proven, id_at, integrated, newest
from tests.faults.test_migration import relay_migrate
from tests.harness import running, settings_for

BEFORE = "0003"
WORKSPACE = UUID(int=7)
RECONCILED = "ActionsService.ReconcileExecution"


@pytest.fixture
async def url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A database whose schema is the one before."""
    name = f"old_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.url())
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        await asyncio.to_thread(migrate, postgres.url(name), BEFORE)
        yield postgres.url(name)
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()


def values_of(number: int) -> dict[str, str]:
    """What an event of the version before had that can be erased now; some of it empty."""
    return {
        "actor_id": f"actor {number}",
        "actor_name": "" if number % 2 else "Jörg",
        "target": f"executions/{number}",
        "peer": "192.0.2.1",
        "idempotency_key_hash": "",
        "params_hash": "ab" * 32,
        "params_prefix": '{"payload":"***"}',
    }


async def fill(connection: Any, count: int) -> list[UUID]:
    """Events of this month, of five earlier ones, and of a clock that was years ahead; their ids."""
    now = datetime.now(UTC)
    ids = [id_at(now - timedelta(days=31 * (n % 6), milliseconds=n)) for n in range(count - 1)]
    ids.append(id_at(now + timedelta(days=1000)))
    await connection.execute("INSERT INTO workspaces (id, name) VALUES ($1, 'default')", WORKSPACE)
    for number, id_ in enumerate(ids):
        values = values_of(number)
        action, reason = [("test.Old", "FAILING"), (RECONCILED, "it is in their ledger")][number % 2]
        await connection.execute(
            f"""
            INSERT INTO audit_logs
              (id, workspace_id, actor_type, action, action_type, provider, status, reason, scopes, request_id,
               trace_id, duration, count, {", ".join(values)})
            VALUES ($1, $2, 'user', $3, 'webhook.send', 'independent', 'success', $4, '{{a,b}}', 'r', 't',
                    '1.5 s', 3, {", ".join(f"${5 + n}" for n in range(len(values)))})
            """,
            id_,
            SYSTEM_WORKSPACE if number % 5 == 4 else WORKSPACE,
            action,
            reason,
            *values.values(),
        )
    return ids


async def test_they_are_there_with_commitments_that_hold_and_get_their_places(url: str, data_dir: Path) -> None:
    connection = await asyncpg.connect(url)
    ids = await fill(connection, 60)
    assert await relay_migrate(url, RELAY_FAILPOINT="migration.midway:1") == -signal.SIGKILL
    assert await connection.fetchval("SELECT count(*) FROM audit_logs") == len(ids), "as if nothing had been begun"
    assert await relay_migrate(url) == 0
    rows = await connection.fetch(
        "SELECT *, v.tableoid::regclass::text AS part FROM audit_events e JOIN audit_values v USING (workspace_id, id)"
    )
    by_id = {row["id"]: row for row in rows}
    assert by_id.keys() == set(ids)
    assert len({row["salts"][:SALT_BYTES] for row in rows}) == len(ids)
    for number, id_ in enumerate(ids):
        row = by_id[id_]
        words = "it is in their ledger" if number % 2 else ""
        expected = values_of(number) | {"note": words}
        assert row["reason"] == ("" if words else "FAILING"), "words of people can be erased from now on"
        assert row["workspace_id"] == (SYSTEM_WORKSPACE if number % 5 == 4 else WORKSPACE)
        assert row["created_at"] == time_of(id_)
        assert (row["actor_type"], row["scopes"], row["count"]) == ("user", ["a", "b"], 3)
        assert row["duration"] == timedelta(seconds=1.5)
        month = f"audit_values_{time_of(id_):%Y_%m}"
        assert row["part"] == (month if time_of(id_) < datetime.now(UTC) else "audit_values_default")
        for n, name in enumerate(ERASABLE):
            assert row[name] == expected[name]
            salt = row["salts"][SALT_BYTES * n : SALT_BYTES * (n + 1)]
            commitment = hashlib.sha256(salt + expected[name].encode()).digest() if expected[name] else None
            assert row["commitments"][n] == commitment, name
    assert await connection.fetchval("SELECT count(*) FROM audit_pending") == len(ids)
    assert not await connection.fetchval("SELECT to_regclass('audit_logs_before')")

    async with running(url, settings_for(data_dir)) as relay:
        await integrated(relay)
        for workspace_id in (WORKSPACE, SYSTEM_WORKSPACE):
            proven = await assert_proven(connection, workspace_id)
            assert len(proven) == (await newest(connection, workspace_id))[0]
        async with relay.connect(relay.tenant.admin) as client:
            listed = {event.id async for event in client.audit.list_events()}
            assert listed >= {str(id_) for id_, row in by_id.items() if row["workspace_id"] == WORKSPACE}
    await connection.close()
