"""Tenants don't see each other: not through any method (the first wall), and not in the database (the second)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from relay.v1 import actions_pb2, auth_pb2

from relay_grpc.call import Method
from tests.contract.requests import all_fields, fitting, put, rules_of
from tests.harness import Receiver, Relay, Tenant
from tests.rpc.wire import METHODS, Wire, wired

CONFINED = (
    "api_keys",
    "connections",
    "connection_secrets",
    "previews",
    "action_executions",
    "execution_attempts",
    "audit_logs",
)


@dataclass
class Theirs:
    """What another tenant has, and a connection of its own."""

    tenant: Tenant
    wire: Wire
    key: auth_pb2.ApiKey
    preview: actions_pb2.Preview
    execution: actions_pb2.Execution

    def id_for(self, method: Method, field: FieldDescriptor) -> str:
        """The id of the kind that this field of a request names. A new kind of field needs a line here."""
        names = {
            "connection_id": self.preview.connection_id,
            "preview_id": self.preview.id,
            "execution_id": self.execution.id,
            "event_id": str(uuid4()),  # read by methods that are not built yet
        }
        ids = {
            "GetApiKey": self.key.id,
            "RotateApiKey": self.key.id,
            "RevokeApiKey": self.key.id,
            "GetConnection": self.preview.connection_id,
            "DeleteConnection": self.preview.connection_id,
            "RotateSecret": self.preview.connection_id,
            "GetPreview": self.preview.id,
            "GetExecution": self.execution.id,
            "WatchExecution": self.execution.id,
            "CancelExecution": self.execution.id,
            "ResendExecution": self.execution.id,
            "ReconcileExecution": self.execution.id,
            "GetRecovery": str(uuid4()),
            "CancelRecovery": str(uuid4()),
            "GetEvent": str(uuid4()),
        }
        return ids[method.rpc] if field.name == "id" else names[field.name]


@pytest.fixture(scope="module")
async def theirs(relay: Relay) -> AsyncIterator[Theirs]:
    """A's tenant, with a row in every table; nothing listens where its connection goes."""
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client, wired(relay, tenant.admin) as wire:
        (key,) = [key async for key in client.auth.list_api_keys() if key.role == "viewer"]
        connection = await client.connections.create_webhook("theirs", "http://127.0.0.1:9/", default=True)
        preview = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=connection.id)
        used = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=connection.id)
        execution = await client.actions.execute(used, idempotency_key="theirs")
        yield Theirs(tenant, wire, key, preview, execution)


NAMED = [
    pytest.param(method, fields[-1], id=f"{method.name}-{fields[-1].name}")
    for method in METHODS.values()
    for fields in all_fields(method.input_type.DESCRIPTOR)
    if rules_of(fields[-1]).string.uuid
]


@pytest.mark.parametrize(("method", "field"), NAMED)
async def test_an_id_of_another_tenant_is_like_one_that_does_not_exist(
    wire: Wire, theirs: Theirs, method: Method, field: FieldDescriptor
) -> None:
    def request_for(id_: str) -> Message:
        request = fitting(method.input_type.DESCRIPTOR)
        if method.rpc == "Preview":
            request = actions_pb2.PreviewRequest(action="webhook.send")
            request.parameters.update({"payload": {}})
        put(request, (field,), id_)
        return request

    foreign, random = theirs.id_for(method, field), str(uuid4())
    theirs_, nobodys = [await wire.call(method, request_for(id_)) for id_ in (foreign, random)]
    assert theirs_.text.replace(foreign, random) == nobodys.text
    assert theirs_.code == nobodys.code
    if method.rpc == "ListExecutions":
        assert (theirs_.reply, nobodys.reply) == (method.output_type(), method.output_type())
    elif theirs_.code != "UNIMPLEMENTED":
        assert (theirs_.code, theirs_.reason, nobodys.reason) == ("NOT_FOUND",) + ("RESOURCE_NOT_FOUND",) * 2
        mine = await theirs.wire.call(method, request_for(foreign), theirs.tenant.admin)
        assert mine.code == "OK"  # it is there: for its owner


async def test_listings_of_another_tenant_hold_nothing_of_theirs(relay: Relay, theirs: Theirs) -> None:
    mine = await relay.new_tenant()
    async with relay.connect(mine.admin) as client:
        assert [one async for one in client.connections.list()] == []
        assert [one async for one in client.actions.list_executions()] == []
        assert [one async for one in client.actions.list_executions(connection_id=theirs.preview.connection_id)] == []
        assert {one.name async for one in client.auth.list_api_keys()} == {
            "viewer",
            "bootstrap admin",
            "bootstrap developer",
        }
        events = [one async for one in client.audit.list_events()]
    own = {
        str(row["id"])
        for row in await relay.sql("SELECT id FROM audit_logs WHERE workspace_id = $1", mine.workspace_id)
    }
    assert events
    assert {event.id for event in events} <= own


async def test_a_key_of_another_caller_in_the_same_workspace_sees_no_preview_of_theirs(
    relay: Relay, theirs: Theirs
) -> None:
    request = actions_pb2.GetPreviewRequest(id=theirs.preview.id)
    answer = await theirs.wire.call("ActionsService.GetPreview", request, theirs.tenant.developer)
    assert (answer.code, answer.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")


async def test_names_and_idempotency_keys_of_another_tenant_are_free(
    relay: Relay, theirs: Theirs, receiver: Receiver
) -> None:
    async with relay.connect((await relay.new_tenant()).admin) as client:
        connection = await client.connections.create_webhook("theirs", receiver.url, default=True)
        assert connection.default
        preview = await client.actions.preview("webhook.send", {"payload": {}})
        execution = await client.actions.execute(preview, idempotency_key="theirs")
    assert not execution.replayed
    assert execution.id != theirs.execution.id
    assert receiver.ids() == [execution.id]


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
async def test_relay_app_in_one_workspace_reaches_no_row_of_another(relay: Relay, theirs: Theirs, table: str) -> None:
    foreign = theirs.tenant.workspace_id
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
    relay: Relay, theirs: Theirs, table: str, column: str
) -> None:
    async with as_role(relay, "relay_app", relay.tenant.workspace_id) as connection:
        changed = await connection.execute(
            f"UPDATE {table} SET {column} = {column} WHERE workspace_id = $1", theirs.tenant.workspace_id
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
