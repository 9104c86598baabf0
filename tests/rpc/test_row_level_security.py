"""The second wall between tenants: what Postgres itself keeps from the roles that serve."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.harness import Relay, Tenant

CONFINED = (
    "api_keys",
    "connections",
    "connection_secrets",
    "previews",
    "action_executions",
    "execution_attempts",
    "audit_logs",
)


@pytest.fixture(scope="module")
async def theirs(relay: Relay) -> Tenant:
    """Another tenant, with a row in every table; nothing listens where its connection goes."""
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        await client.connections.create_webhook("theirs", "http://127.0.0.1:9/", default=True)
        await client.actions.execute(await client.actions.preview("webhook.send", {"payload": {}}))
    return tenant


@asynccontextmanager
async def as_role(relay: Relay, role: str, workspace_id: UUID | None = None) -> AsyncIterator[Any]:
    """A connection with a serving role's rights, in a transaction that is rolled back."""
    connection = await asyncpg.connect(relay.url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"SET LOCAL ROLE {role}")
        if workspace_id:
            await connection.execute(f"SET LOCAL relay.workspace_id = '{workspace_id}'")
        yield connection
        await transaction.rollback()
    finally:
        await connection.close()


async def test_every_table_of_a_workspace_is_confined(relay: Relay) -> None:
    rows = await relay.sql(
        """
        SELECT relname, relrowsecurity AND relforcerowsecurity AS confined FROM pg_class
         WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
           AND relname <> 'alembic_version'
        """
    )
    assert dict(map(tuple, rows)) == dict.fromkeys((*CONFINED, "workspaces"), True)


@pytest.mark.parametrize("table", CONFINED)
async def test_relay_app_in_one_workspace_reaches_no_row_of_another(relay: Relay, theirs: Tenant, table: str) -> None:
    foreign = theirs.workspace_id
    stored = await relay.sql(f"SELECT to_jsonb(t)::text AS row FROM {table} t WHERE workspace_id = $1", foreign)
    assert stored
    async with as_role(relay, "relay_app", relay.tenant.workspace_id) as connection:
        assert await connection.fetch(f"SELECT FROM {table} WHERE workspace_id = $1", foreign) == []
        assert (
            await connection.fetchval(
                f"SELECT count(*) FROM {table} WHERE workspace_id <> $1", relay.tenant.workspace_id
            )
            == 0
        )
        for statement, *arguments in (
            (
                f"INSERT INTO {table} SELECT * FROM jsonb_populate_record(NULL::{table}, $1::text::jsonb)",
                stored[0]["row"],
            ),
            (f"UPDATE {table} SET workspace_id = workspace_id",),
            (f"DELETE FROM {table}",),
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with connection.transaction():
                    await connection.execute(statement, *arguments)


@pytest.mark.parametrize(("table", "column"), [("api_keys", "revoked_at"), ("connections", "is_default")])
async def test_what_relay_app_may_change_it_changes_in_its_own_workspace_alone(
    relay: Relay, theirs: Tenant, table: str, column: str
) -> None:
    async with as_role(relay, "relay_app", relay.tenant.workspace_id) as connection:
        changed = await connection.execute(
            f"UPDATE {table} SET {column} = {column} WHERE workspace_id = $1", theirs.workspace_id
        )
    assert changed == "UPDATE 0"


@pytest.mark.parametrize("table", [*CONFINED, "workspaces"])
async def test_without_a_workspace_relay_app_gets_an_error_instead_of_rows(relay: Relay, table: str) -> None:
    async with as_role(relay, "relay_app") as connection:
        with pytest.raises(asyncpg.UndefinedObjectError, match=r"relay\.workspace_id"):
            await connection.fetch(f"SELECT FROM {table}")


async def test_a_workspace_ends_with_its_transaction(relay: Relay) -> None:
    async with relay.app.db.workspace(relay.tenant.workspace_id) as connection:
        assert await connection.fetchval("SELECT count(*) FROM workspaces") == 1
    async with relay.app.db.anyone() as connection:
        with pytest.raises(asyncpg.PostgresError):
            await connection.fetch("SELECT FROM workspaces")


@pytest.mark.parametrize("role", ["relay_app", "relay_worker"])
@pytest.mark.parametrize("table", ["audit_logs", "audit_logs_default"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE {} SET count = count",
        "DELETE FROM {}",
        "TRUNCATE {}",
        "DROP TABLE {}",
        "ALTER TABLE {} DISABLE ROW LEVEL SECURITY",
    ],
)
async def test_nobody_who_serves_can_change_the_audit_log(relay: Relay, role: str, table: str, statement: str) -> None:
    async with as_role(relay, role, relay.tenant.workspace_id) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement.format(table))


@pytest.mark.parametrize(
    ("role", "table"),
    [("relay_worker", "audit_logs"), ("relay_worker", "audit_logs_default"), ("relay_app", "audit_logs_default")],
)
async def test_the_audit_log_is_read_by_relay_app_alone_and_not_around_its_policy(
    relay: Relay, role: str, table: str
) -> None:
    async with as_role(relay, role, relay.tenant.workspace_id) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch(f"SELECT FROM {table}")


@pytest.mark.parametrize("role", ["relay_app", "relay_worker"])
async def test_nobody_who_serves_can_become_somebody_else_by_rights(relay: Relay, role: str) -> None:
    rows = await relay.sql(
        """
        SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolcanlogin,
               (SELECT count(*) FROM pg_auth_members WHERE member = r.oid) AS memberships,
               (SELECT count(*) FROM pg_class WHERE relowner = r.oid) AS owned,
               has_schema_privilege(rolname, 'public', 'CREATE') AS creates
          FROM pg_roles r WHERE rolname = $1
        """,
        role,
    )
    assert not any(rows[0].values())
