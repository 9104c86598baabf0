"""The operator's way into the database: one transaction as relay_owner, whose event tells what it changed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc.audit import store
from relay_grpc.audit.event import ActorType, Event
from relay_grpc.db import COMMAND_TIMEOUT, CONNECT_TIMEOUT, OWNER, DatabaseUnusable, reason

if TYPE_CHECKING:
    from relay_grpc.db import Connection

VACUUM_TIMEOUT = 6 * 3600.0  # seconds, for all partitions of a table


class UnknownWorkspace(Exception):
    """No workspace has this name."""


@asynccontextmanager
async def as_owner(url: str) -> AsyncIterator["Connection"]:
    """A transaction that sees every workspace. Raises DatabaseUnusable."""
    async with _connected(url) as connection, connection.transaction():
        await connection.execute(f"SET LOCAL ROLE {OWNER}")
        yield connection


async def vacuum(url: str, table: str) -> None:
    """Has Postgres forget what was deleted from a table, in indexes and statistics too. Raises DatabaseUnusable."""
    async with _connected(url) as connection:
        await connection.execute(f"SET ROLE {OWNER}")
        await connection.execute(f"VACUUM (INDEX_CLEANUP ON, ANALYZE) {table}", timeout=VACUUM_TIMEOUT)


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    try:
        connection = await asyncpg.connect(url, timeout=CONNECT_TIMEOUT, command_timeout=COMMAND_TIMEOUT)
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise DatabaseUnusable(f"the database can't be reached: {reason(error)}; check DATABASE_URL") from error
    try:
        yield connection
    except (asyncpg.InvalidParameterValueError, asyncpg.UndefinedTableError) as error:
        raise DatabaseUnusable("the database has no Relay in it: run `relay migrate`") from error
    except asyncpg.UndefinedColumnError as error:
        raise DatabaseUnusable("the schema is not the one of this version: run `relay migrate`") from error
    except asyncpg.InterfaceError as error:  # whatever cut it, the transaction can't be left any more
        raise DatabaseUnusable("the database ended the connection: try again") from error
    except (TimeoutError, asyncpg.PostgresError) as error:
        raise DatabaseUnusable(f"the database refuses: {reason(error)}") from error
    finally:
        await connection.close()


async def record(
    connection: "Connection",
    workspace_id: UUID,
    action: str,
    target: str,
    *,
    provider: str = "",
    reason: str = "",
    note: str = "",
    params_prefix: str = "",
    count: int = 1,
) -> None:
    """Writes the event of what the operator does in this transaction. action: such as "operator.CreateApiKey"."""
    event = Event(
        workspace_id=workspace_id,
        action=action,
        target=target,
        provider=provider,
        reason=reason,
        note=note,
        count=count,
        actor_type=ActorType.OPERATOR,
        params_prefix=params_prefix,
    )
    await store.insert(connection, [event])


async def find_workspace(connection: "Connection", name: str) -> UUID:
    """That of a name; the system's is "system". Raises UnknownWorkspace."""
    found: UUID | None = await connection.fetchval("SELECT id FROM workspaces WHERE name = $1", name)
    if found is None:
        raise UnknownWorkspace(name)
    return found
