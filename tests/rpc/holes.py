"""Holes in the walls between tenants, made on purpose: a test that does not find them proves nothing."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from relay_grpc import db, errors
from relay_grpc.connections import store as connections

_OWN = re.compile(r"\b(?:\w+\.)?workspace_id = (?:(\$\d)|[ip]\.workspace_id)")


def no_query_names_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wall is gone: every condition on a workspace holds for all of them."""
    execute: Any = asyncpg.Connection._execute

    def anywhere(self: Any, query: str, *arguments: Any, **options: Any) -> Any:
        if self._params.server_settings:  # one of the server's pools, and not the test's
            query = _OWN.sub(lambda own: f"{own[1]}::uuid IS NOT NULL" if own[1] else "true", query)
        return execute(self, query, *arguments, **options)

    monkeypatch.setattr(asyncpg.Connection, "_execute", anywhere)


def no_policy_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second wall is gone: requests run as the superuser."""

    async def unchecked(*_: Any, **__: Any) -> None:
        pass

    monkeypatch.setattr(db, "APP", "relay")
    monkeypatch.setattr(db, "_check", unchecked)


def connections_keep_their_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace outlives its transaction, and the next one believes it."""

    @asynccontextmanager
    async def workspace(
        self: Any, workspace_id: UUID, committed: Callable[[], None] = lambda: None
    ) -> AsyncIterator[Any]:
        async with db._lent(self._app) as connection:
            if not await connection.fetchval("SELECT current_setting('relay.workspace_id', true)"):
                await connection.execute(f"SET relay.workspace_id = '{workspace_id}'")
            async with connection.transaction():
                yield connection
        committed()

    monkeypatch.setattr(db.Database, "workspace", workspace)


def names_of_others_are_refused(monkeypatch: pytest.MonkeyPatch, superuser: Any) -> None:
    """No row gets out, but what is there answers otherwise than what is not."""
    get: Any = connections.get

    async def telling(connection: Any, workspace_id: UUID, id_: UUID) -> Any:
        if await superuser.fetchval(
            "SELECT true FROM connections WHERE id = $1 AND workspace_id <> $2", id_, workspace_id
        ):
            raise errors.PermissionDenied(f"connection {str(id_)!r} is another workspace's")
        return await get(connection, workspace_id, id_)

    monkeypatch.setattr(connections, "get", telling)
