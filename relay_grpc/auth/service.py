"""AuthService: who the caller is, and the keys of its workspace."""

from datetime import UTC
from typing import Any
from uuid import UUID

import asyncpg
from relay.v1 import auth_pb2

from relay_grpc import errors
from relay_grpc.audit.recorder import Recorder
from relay_grpc.auth import keys, scopes, store
from relay_grpc.auth.verifier import KeyVerifier
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.paging import page_of


class AuthService:
    """live: whether the keys made here are for production."""

    def __init__(self, db: Database, recorder: Recorder, verifier: KeyVerifier, *, live: bool) -> None:
        self._db = db
        self._recorder = recorder
        self._verifier = verifier
        self._live = live

    async def WhoAmI(self, _request: Any, call: Call) -> auth_pb2.Principal:
        principal = call.principal
        return auth_pb2.Principal(
            type=f"PRINCIPAL_TYPE_{principal.type.upper()}",
            id=principal.id,
            name=principal.name,
            workspace_id=str(principal.workspace_id),
            role=principal.role,
            scopes=sorted(principal.scopes),
            expire_time=principal.expires_at,
        )

    async def CreateApiKey(self, request: Any, call: Call) -> auth_pb2.ApiKey:
        if request.role not in scopes.ROLES:
            raise errors.NotFound("role", request.role)
        if foreign := set(request.scopes) - scopes.ROLES[request.role]:
            raise errors.InvalidRequest([("scopes", f"{', '.join(sorted(foreign))}: not of the role {request.role}")])
        beyond = scopes.effective(request.role, request.scopes) - call.principal.scopes
        if beyond:
            raise errors.PermissionDenied(
                f"a key can't be given more than its maker holds: {', '.join(sorted(beyond))}",
                reason="CEILING_EXCEEDED",
                metadata={"missing_scopes": " ".join(sorted(beyond))},
            )
        expires_at = request.expire_time.ToDatetime(UTC) if request.HasField("expire_time") else None
        ends = call.principal.expires_at
        if ends is not None and (expires_at is None or expires_at > ends):
            raise errors.PermissionDenied(
                f"a key can't outlive its maker, which expires at {ends.isoformat()}: give an expire_time until then",
                reason="CEILING_EXCEEDED",
            )
        key = keys.generate(live=self._live)
        key_hash = await self._verifier.hash(key.text)
        async with self._recorder.change(call) as (connection, event):
            row = await store.insert_key(
                connection,
                id_=uuid7(),
                workspace_id=call.workspace_id,
                public_id=key.public_id,
                key_hash=key_hash,
                name=request.name,
                role=request.role,
                scopes=sorted(request.scopes),
                created_by=call.principal.id,
                expires_at=expires_at,
            )
            event.target = f"apiKeys/{row['id']}"
        message = key_message(row)
        message.secret = key.text
        return message

    async def ListApiKeys(self, request: Any, call: Call) -> auth_pb2.ListApiKeysResponse:
        page = page_of(request, call, UUID)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await store.list_keys(
                connection,
                call.workspace_id,
                before=page.cursor,
                limit=page.fetch,
            )
        rows, next_page_token = page.cut(rows)
        return auth_pb2.ListApiKeysResponse(api_keys=map(key_message, rows), next_page_token=next_page_token)

    async def RevokeApiKey(self, request: Any, call: Call) -> auth_pb2.ApiKey:
        try:
            async with self._recorder.change(call) as (connection, event):
                row = await store.revoke_key(connection, call.workspace_id, UUID(request.id))
                if row is None:
                    raise errors.NotFound("API key", request.id)
                event.target = f"apiKeys/{row['id']}"
        finally:
            self._verifier.forget(UUID(request.id))  # a caller that went away may have revoked it all the same
        return key_message(row)


def key_message(row: asyncpg.Record) -> auth_pb2.ApiKey:
    return auth_pb2.ApiKey(
        id=str(row["id"]),
        public_id=row["public_id"],
        name=row["name"],
        role=row["role"],
        scopes=sorted(scopes.effective(row["role"], row["scopes"])),
        creator=row["created_by"],
        create_time=row["created_at"],
        expire_time=row["expires_at"],
        revoke_time=row["revoked_at"],
        last_used_time=row["last_used_at"],
    )
