"""Word of changes: heard at once from whoever makes them, and what could have been missed is not believed."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from relay_grpc.auth import changes as listening
from relay_grpc.auth.changes import RECONNECT_INTERVAL, Changes
from relay_grpc.db import Database
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.telemetry import Metrics
from tests.actions.caller import eventually
from tests.harness import Relay

LISTENERS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'relay listener' AND datname = $1"


@dataclass
class Listener:
    """A Changes of the test's own. elsewhere: a connection to another database, which nothing here touches."""

    changes: Changes
    metrics: Metrics
    database: str
    elsewhere: Any
    others: set[int]

    @property
    def is_up(self) -> bool:
        return bool(self.metrics.registry.get_sample_value("relay_changes_listening"))

    async def pid(self) -> int:
        """Of the server process at the other end."""
        pids = {row["pid"] for row in await self.elsewhere.fetch(LISTENERS, self.database)}
        (own,) = pids - self.others
        return int(own)

    async def lose(self) -> None:
        await self.elsewhere.execute(f"SELECT pg_terminate_backend({await self.pid()})")

    @asynccontextmanager
    async def kept_down(self) -> AsyncIterator[None]:
        """The database takes no new connection, whoever asks."""
        await self.elsewhere.execute(f"ALTER DATABASE {self.database} ALLOW_CONNECTIONS false")
        try:
            await self.lose()
            yield
        finally:
            await self.elsewhere.execute(f"ALTER DATABASE {self.database} ALLOW_CONNECTIONS true")


@pytest.fixture
async def listener(relay: Relay, postgres: EmbeddedPostgres) -> AsyncIterator[Listener]:
    elsewhere = await asyncpg.connect(postgres.url())
    database = urlsplit(relay.url).path.strip("/")
    others = {row["pid"] for row in await elsewhere.fetch(LISTENERS, database)}
    db, metrics = await Database.open(relay.url), Metrics()
    one = Listener(Changes(db, metrics), metrics, database, elsewhere, others)
    try:
        await eventually(lambda: one.is_up)
        yield one
    finally:
        await one.changes.close()
        await db.close()
        await elsewhere.close()


def now() -> float:
    return time.monotonic()


CHANGES = {
    "a key is revoked": "UPDATE api_keys SET revoked_at = now() WHERE workspace_id = $1",
    "a key's expiry is changed": "UPDATE api_keys SET expires_at = now() WHERE workspace_id = $1",
    "a key is rotated": "UPDATE api_keys SET retires_at = now() WHERE workspace_id = $1",
    "a key's role is changed": "UPDATE api_keys SET role = 'viewer' WHERE workspace_id = $1",
    "a key's scopes are changed": "UPDATE api_keys SET scopes = '{keys:read}' WHERE workspace_id = $1",
    "a key's limits are changed": "UPDATE api_keys SET calls_per_minute = 1 WHERE workspace_id = $1",
    "a role is narrowed": "UPDATE custom_roles SET scopes = '{keys:read}' WHERE workspace_id = $1",
    "a user's role is changed": "UPDATE user_roles SET role = 'viewer' WHERE workspace_id = $1",
    "a user's role is taken away": "DELETE FROM user_roles WHERE workspace_id = $1",
    "a role is deleted": "DELETE FROM custom_roles WHERE workspace_id = $1",
    "a workspace's limits are changed": "UPDATE workspaces SET executions_per_minute = 1 WHERE id = $1",
    "a key is deleted": "DELETE FROM api_keys WHERE workspace_id = $1",
}


@pytest.fixture(scope="module")
async def workspace(relay: Relay) -> UUID:
    """With a key, a role and a user to change."""
    tenant = await relay.new_tenant()
    for statement in (
        "INSERT INTO custom_roles (workspace_id, name, parent, scopes, created_by) "
        "VALUES ($1, 'narrow', 'admin', '{keys:write}', 'test')",
        "INSERT INTO user_roles (id, workspace_id, issuer, user_id, role, created_by) "
        "VALUES (gen_random_uuid(), $1, 'https://issuer', 'somebody', 'admin', 'test')",
    ):
        await relay.sql(statement, tenant.workspace_id)
    return tenant.workspace_id


@pytest.mark.parametrize("statement", CHANGES.values(), ids=CHANGES)
async def test_it_hears_when(relay: Relay, listener: Listener, workspace: UUID, statement: str) -> None:
    other, read_at = uuid4(), now()
    assert listener.changes.hold(workspace, read_at)
    await relay.sql(statement, workspace)
    await eventually(lambda: not listener.changes.hold(workspace, read_at))
    assert listener.changes.hold(other, read_at)
    assert listener.changes.hold(workspace, now())


async def test_a_use_of_a_key_is_no_change(relay: Relay, listener: Listener) -> None:
    tenant, other, read_at = relay.tenant.workspace_id, uuid4(), now()
    await relay.sql(
        "UPDATE api_keys SET last_used_at = now(), key_mac = '', pepper_id = 'k' WHERE workspace_id = $1", tenant
    )
    await relay.sql("SELECT pg_notify('relay_changes', $1)", str(other))  # comes after whatever came of it
    await eventually(lambda: not listener.changes.hold(other, read_at))
    assert listener.changes.hold(tenant, read_at)


async def test_a_change_that_is_rolled_back_is_none(relay: Relay, listener: Listener) -> None:
    tenant, other, read_at = relay.tenant.workspace_id, uuid4(), now()
    with pytest.raises(Exception, match="division by zero"):
        await relay.sql(
            "WITH revoked AS (UPDATE api_keys SET revoked_at = now() WHERE workspace_id = $1 RETURNING 1) "
            "SELECT 1 / (count(*) - count(*)) FROM revoked",
            tenant,
        )
    await relay.sql("SELECT pg_notify('relay_changes', $1)", str(other))
    await eventually(lambda: not listener.changes.hold(other, read_at))
    assert listener.changes.hold(tenant, read_at)


async def test_what_this_process_changes_holds_no_more_at_once(listener: Listener) -> None:
    mine, other, read_at = uuid4(), uuid4(), now()
    listener.changes.heard(mine)
    assert not listener.changes.hold(mine, read_at)
    assert listener.changes.hold(other, read_at)
    assert listener.changes.hold(mine, now())


async def test_after_a_lost_connection_nothing_read_before_is_believed(listener: Listener) -> None:
    read_at = now()
    assert listener.changes.hold(uuid4(), read_at)
    await listener.lose()
    await eventually(lambda: not listener.changes.hold(uuid4(), read_at))
    assert now() - read_at < 2  # sooner than a ping would tell
    await eventually(lambda: listener.is_up)
    assert listener.changes.hold(uuid4(), now())


async def test_while_it_can_not_listen_it_says_so_and_then_believes_nothing_it_could_have_missed(
    relay: Relay, listener: Listener
) -> None:
    admin = await asyncpg.connect(relay.url)
    async with listener.kept_down():
        await eventually(lambda: not listener.is_up)
        read_at = now()
        await admin.execute("UPDATE workspaces SET calls_per_minute = 7 WHERE id = $1", relay.tenant.workspace_id)
        await asyncio.sleep(3 * RECONNECT_INTERVAL)
        assert not listener.is_up
        assert listener.changes.hold(relay.tenant.workspace_id, read_at)  # for as long as its reader's patience
    await admin.close()
    await eventually(lambda: listener.is_up)
    assert not listener.changes.hold(relay.tenant.workspace_id, read_at)


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "PING_INTERVAL", 0.1)
    monkeypatch.setattr(listening, "PING_TIMEOUT", 0.2)


async def test_a_frozen_connection_is_found_out(impatience: None, listener: Listener) -> None:
    frozen, read_at = await listener.pid(), now()
    os.kill(frozen, signal.SIGSTOP)
    try:
        await eventually(lambda: not listener.is_up)
        await eventually(lambda: listener.is_up)
        assert not listener.changes.hold(uuid4(), read_at)
    finally:
        os.kill(frozen, signal.SIGCONT)


async def test_word_that_names_no_workspace_is_taken_for_a_change_of_all(relay: Relay, listener: Listener) -> None:
    read_at = now()
    await relay.sql("NOTIFY relay_changes, 'nobody'")
    await eventually(lambda: not listener.changes.hold(uuid4(), read_at))
    assert listener.is_up


async def test_its_memory_is_bounded_and_forgets_on_the_safe_side(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "MAX_WORKSPACES", 100)
    first, read_before = uuid4(), now()
    listener.changes.heard(first)
    read_after = now()
    for _ in range(100):
        listener.changes.heard(uuid4())
    assert not listener.changes.hold(first, read_before)
    assert listener.changes.hold(first, read_after)
    for _ in range(100):
        listener.changes.heard(uuid4())
    assert not listener.changes.hold(first, read_after)
    assert listener.changes.hold(first, now())
    assert len(listener.changes._heard) == 100
