"""AuthService: who the caller is, and the keys of its workspace. Its part about roles: roles.py."""

from datetime import UTC
from typing import Any
from uuid import UUID

import asyncpg
from relay.v1 import auth_pb2

from relay_grpc import errors
from relay_grpc.audit.recorder import Recorder
from relay_grpc.auth import ceiling, keys, scopes, store
from relay_grpc.auth.changes import Changes
from relay_grpc.auth.verifier import KeyState, KeyVerifier
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.paging import page_of
from relay_grpc.principal import NO_LIMITS, Limits, Principal


class AuthService:
    """changes: told of keys that are not what they were. live: whether the keys made here are for production."""

    def __init__(
        self, db: Database, recorder: Recorder, verifier: KeyVerifier, changes: Changes, *, live: bool
    ) -> None:
        self._db = db
        self._recorder = recorder
        self._verifier = verifier
        self._changes = changes
        self._live = live

    async def WhoAmI(self, _request: Any, call: Call) -> auth_pb2.Principal:
        return principal_message(call.principal)

    async def CreateApiKey(self, request: Any, call: Call) -> auth_pb2.ApiKey:
        key, id_ = keys.generate(live=self._live), uuid7()
        sealed = await self._verifier.seal(key.text)
        async with self._recorder.change(call) as (connection, event):
            await store.insert_key(
                connection,
                id_=id_,
                workspace_id=call.workspace_id,
                public_id=key.public_id,
                sealed=sealed,
                name=request.name,
                role=request.role,
                scopes=sorted(request.scopes),
                limits=Limits(request.limits.calls_per_minute or None, request.limits.executions_per_minute or None),
                created_by=call.principal.actor,
                expires_at=request.expire_time.ToDatetime(UTC) if request.HasField("expire_time") else None,
            )
            row = await store.get_key(connection, call.workspace_id, id_)
            scopes.check_narrowing(row["role"], _of_role(row), row["scopes"])
            _check_ceiling(call.principal, row)
            event.target = f"apiKeys/{id_}"
        return key_message(row, secret=key.text)

    async def GetApiKey(self, request: Any, call: Call) -> auth_pb2.ApiKey:
        async with self._db.workspace(call.workspace_id) as connection:
            return key_message(await store.get_key(connection, call.workspace_id, UUID(request.id)))

    async def ListApiKeys(self, request: Any, call: Call) -> auth_pb2.ListApiKeysResponse:
        page = page_of(request, call, UUID)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await store.list_keys(connection, call.workspace_id, before=page.cursor, limit=page.fetch)
        return page.answer(auth_pb2.ListApiKeysResponse, "api_keys", rows, key_message)

    async def RotateApiKey(self, request: Any, call: Call) -> auth_pb2.ApiKey:
        old_id, new_id = UUID(request.id), uuid7()
        call.target = f"apiKeys/{old_id}"
        key = keys.generate(live=self._live)
        sealed = await self._verifier.seal(key.text)
        try:
            async with self._recorder.change(call) as (connection, event):
                event.note = f"apiKeys/{new_id}"
                worked = await store.retire_key(connection, call.workspace_id, old_id, request.overlap.ToTimedelta())
                old = await store.get_key(connection, call.workspace_id, old_id)
                if not worked:
                    raise errors.FailedPrecondition(
                        "this key was revoked or has expired, and can't be rotated: make a new one",
                        reason="KEY_INACTIVE",
                    )
                _check_ceiling(call.principal, old)
                await store.copy_key(
                    connection,
                    call.workspace_id,
                    old_id,
                    id_=new_id,
                    public_id=key.public_id,
                    sealed=sealed,
                    created_by=call.principal.actor,
                )
                row = await store.get_key(connection, call.workspace_id, new_id)
        finally:
            self._changes.heard(call.workspace_id)  # a caller that went away may have rotated it all the same
        return key_message(row, secret=key.text)

    async def RevokeApiKey(self, request: Any, call: Call) -> auth_pb2.ApiKey:
        id_ = UUID(request.id)
        call.target = f"apiKeys/{id_}"
        try:
            async with self._recorder.change(call) as (connection, _):
                await store.revoke_key(connection, call.workspace_id, id_)
                row = await store.get_key(connection, call.workspace_id, id_)
        finally:
            self._changes.heard(call.workspace_id)  # a caller that went away may have revoked it all the same
        return key_message(row)

    async def VerifyApiKey(self, request: Any, call: Call) -> auth_pb2.VerifyApiKeyResponse:
        state, principal = await self._verifier.examine(request.key, call.workspace_id)
        if principal is None or state is not KeyState.VALID:
            return auth_pb2.VerifyApiKeyResponse(code=f"VERIFICATION_CODE_{state.upper()}")
        missing = sorted(set(request.scopes) - principal.scopes)
        return auth_pb2.VerifyApiKeyResponse(
            code="VERIFICATION_CODE_INSUFFICIENT_SCOPES" if missing else "VERIFICATION_CODE_VALID",
            principal=principal_message(principal),
            missing_scopes=missing,
        )


def principal_message(principal: Principal) -> auth_pb2.Principal:
    return auth_pb2.Principal(
        type=f"PRINCIPAL_TYPE_{principal.type.upper()}",
        id=principal.id,
        name=principal.name,
        workspace_id=str(principal.workspace_id),
        role=principal.role,
        scopes=sorted(principal.scopes),
        expire_time=principal.expires_at,
    )


def key_message(row: asyncpg.Record, *, secret: str = "") -> auth_pb2.ApiKey:
    limits = _limits(row)
    return auth_pb2.ApiKey(
        id=str(row["id"]),
        public_id=row["public_id"],
        name=row["name"],
        role=row["role"],
        scopes=sorted(scopes.kept(_of_role(row), row["scopes"])),
        creator=row["created_by"],
        create_time=row["created_at"],
        expire_time=row["expires_at"],
        revoke_time=row["revoked_at"],
        last_used_time=row["last_used_at"],
        secret=secret,
        retire_time=row["retires_at"],
        lineage_id=str(row["lineage_id"]),
        limits=auth_pb2.KeyLimits(calls_per_minute=limits.calls, executions_per_minute=limits.executions)
        if limits != NO_LIMITS
        else None,
    )


def _check_ceiling(maker: Principal, row: asyncpg.Record) -> None:
    """Raises PermissionDenied unless the maker may have this key in its hands."""
    ceiling.check_key(maker, scopes.kept(_of_role(row), row["scopes"]), row["expires_at"], _limits(row))


def _of_role(row: asyncpg.Record) -> frozenset[str]:
    return scopes.of_role(row["role"], row["role_parent"], row["role_scopes"])


def _limits(row: asyncpg.Record) -> Limits:
    return Limits(row["calls_per_minute"], row["executions_per_minute"])
