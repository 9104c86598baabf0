"""The part of AuthService that is about roles: those of a workspace, and which user has which."""

import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

import asyncpg
from google.protobuf import empty_pb2
from relay.v1 import auth_pb2

from relay_grpc import errors
from relay_grpc.audit.recorder import Recorder
from relay_grpc.auth import ceiling, scopes, store
from relay_grpc.auth.changes import Changes
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.paging import page_of

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")


class Roles:
    """changes: told of users whose role is not what it was.

    issuer: which one a request means by what it says, "" for the only one; raises InvalidRequest.
    """

    def __init__(self, db: Database, recorder: Recorder, changes: Changes, issuer: Callable[[str], str]) -> None:
        self._db = db
        self._recorder = recorder
        self._changes = changes
        self._issuer = issuer

    async def CreateRole(self, request: Any, call: Call) -> auth_pb2.Role:
        call.target = f"roles/{request.name}"
        if request.name in scopes.ROLES:
            raise errors.AlreadyExists(f"the role {request.name!r} is built in")
        scopes.check_narrowing(request.parent, scopes.ROLES[request.parent], request.scopes)
        ceiling.check_scopes(call.principal, frozenset(request.scopes))
        async with self._recorder.change(call) as (connection, _):
            row = await store.insert_role(
                connection,
                call.workspace_id,
                name=request.name,
                parent=request.parent,
                scopes=sorted(request.scopes),
                created_by=call.principal.actor,
            )
        return role_message(row)

    async def ListRoles(self, request: Any, call: Call) -> auth_pb2.ListRolesResponse:
        page = page_of(request, call, _name)
        after = page.cursor or ""
        in_built_in = after in scopes.ROLES or not after
        built_in = [_built_in(name) for name in sorted(scopes.ROLES) if in_built_in and name > after]
        async with self._db.workspace(call.workspace_id) as connection:
            own = await store.list_roles(
                connection, call.workspace_id, after="" if in_built_in else after, limit=page.fetch
            )
        return page.answer(auth_pb2.ListRolesResponse, "roles", [*built_in, *own], role_message, cursor="name")

    async def DeleteRole(self, request: Any, call: Call) -> empty_pb2.Empty:
        call.target = f"roles/{request.name}"
        async with self._recorder.change(call) as (connection, _):
            await store.delete_role(connection, call.workspace_id, request.name)
        return empty_pb2.Empty()

    async def AssignRole(self, request: Any, call: Call) -> auth_pb2.RoleAssignment:
        issuer = self._issuer(request.issuer)
        call.target = f"roleAssignments/{issuer}#{request.user_id}"
        try:
            async with self._recorder.change(call) as (connection, _):
                row = await store.assign_role(
                    connection,
                    id_=uuid7(),
                    workspace_id=call.workspace_id,
                    issuer=issuer,
                    user_id=request.user_id,
                    role=request.role,
                    created_by=call.principal.actor,
                )
                given = scopes.of_role(row["role"], row["role_parent"], row["role_scopes"])
                ceiling.check_scopes(call.principal, given)
        finally:
            self._changes.heard(call.workspace_id)
        return assignment_message(row)

    async def ListRoleAssignments(self, request: Any, call: Call) -> auth_pb2.ListRoleAssignmentsResponse:
        page = page_of(request, call, UUID)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await store.list_user_roles(connection, call.workspace_id, before=page.cursor, limit=page.fetch)
        return page.answer(auth_pb2.ListRoleAssignmentsResponse, "role_assignments", rows, assignment_message)

    async def RemoveRole(self, request: Any, call: Call) -> empty_pb2.Empty:
        issuer = request.issuer or self._issuer("")  # one that the server no longer knows left its users behind
        call.target = f"roleAssignments/{issuer}#{request.user_id}"
        try:
            async with self._recorder.change(call) as (connection, _):
                await store.remove_role(connection, call.workspace_id, issuer=issuer, user_id=request.user_id)
        finally:
            self._changes.heard(call.workspace_id)
        return empty_pb2.Empty()


def role_message(row: asyncpg.Record | dict[str, Any]) -> auth_pb2.Role:
    return auth_pb2.Role(
        name=row["name"],
        scopes=sorted(scopes.of_role(row["name"], row["parent"], row["scopes"])),
        parent=row["parent"],
        create_time=row["created_at"],
    )


def assignment_message(row: asyncpg.Record) -> auth_pb2.RoleAssignment:
    return auth_pb2.RoleAssignment(
        user_id=row["user_id"],
        role=row["role"],
        creator=row["created_by"],
        create_time=row["created_at"],
        issuer=row["issuer"],
    )


def _built_in(name: str) -> dict[str, Any]:
    """A row like those of the workspace's own roles."""
    return {"name": name, "parent": None, "scopes": None, "created_at": None}


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("no role has this name")
    return text
