"""ConnectionsService: where a workspace's actions go. Its part about secrets: rotation.py."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

from google.protobuf.empty_pb2 import Empty
from relay.v1 import connections_pb2

from relay_grpc import errors
from relay_grpc.actions.providers import Provider
from relay_grpc.actions.signing import Scheme
from relay_grpc.audit.event import Event
from relay_grpc.audit.recorder import Recorder
from relay_grpc.call import Call
from relay_grpc.connections import changes, configuration, messages, secret_store, store
from relay_grpc.connections.new_keys import new_key
from relay_grpc.connections.secrets import Undecryptable, Vault
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.paging import page_of

if TYPE_CHECKING:
    from relay_grpc.db import Connection


class ConnectionsService:
    """webhooks: the provider that looks a webhook's configuration over."""

    def __init__(self, db: Database, recorder: Recorder, vault: Vault, webhooks: Provider) -> None:
        self._db = db
        self._recorder = recorder
        self._vault = vault
        self._webhooks = webhooks

    async def CreateConnection(self, request: Any, call: Call) -> connections_pb2.Connection:
        settings = configuration.merged({}, configuration.stored(request.webhook))
        headers = configuration.headers(request.webhook.headers, {}, "webhook.headers")
        key = new_key(request.signature_scheme, request.signing_secret, otherwise=Scheme.HMAC)
        changes.check_body_signature(settings, key.scheme, "webhook.body_signature")
        await self._webhooks.check(settings)
        id_ = uuid7()
        async with self._change(call, validate_only=request.validate_only) as (connection, event):
            await store.insert(
                connection,
                id_=id_,
                workspace_id=call.workspace_id,
                name=request.name,
                provider=self._webhooks.name,
                configuration=settings,
                default=request.default,
            )
            await secret_store.insert(
                connection,
                self._vault,
                workspace_id=call.workspace_id,
                connection_id=id_,
                kind=key.scheme,
                secret=key.raw,
            )
            await secret_store.set_headers(connection, self._vault, call.workspace_id, id_, headers)
            row = await store.get(connection, call.workspace_id, id_)
            if not request.validate_only:
                event.target = f"connections/{id_}"
        message = messages.connection(row, signing_secret=key.told)
        if request.validate_only:
            for made in ("id", "create_time", "update_time", "signing_secret", "signing_keys"):
                message.ClearField(made)
        return message

    async def GetConnection(self, request: Any, call: Call) -> connections_pb2.Connection:
        async with self._db.workspace(call.workspace_id) as connection:
            return messages.connection(await store.get(connection, call.workspace_id, UUID(request.id)))

    async def ListConnections(self, request: Any, call: Call) -> connections_pb2.ListConnectionsResponse:
        page = page_of(request, call, UUID)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await store.list_(connection, call.workspace_id, before=page.cursor, limit=page.fetch)
        return page.answer(connections_pb2.ListConnectionsResponse, "connections", rows, messages.connection)

    async def UpdateConnection(self, request: Any, call: Call) -> connections_pb2.Connection:
        asked, fields = request.connection, changes.fields(request)
        id_ = _id(asked.id)
        call.target = f"connections/{id_}"
        if "webhook.url" in fields:
            await self._check_url(asked.webhook)
        async with self._change(call, validate_only=request.validate_only) as (connection, _):
            if "default" in fields and asked.default:
                await store.clear_default(connection, call.workspace_id, besides=id_)
            row = await store.lock(connection, call.workspace_id, id_)
            kept = await self._kept_headers(connection, call.workspace_id, id_) if "webhook.headers" in fields else {}
            change = changes.decide(row, asked, fields, kept)
            await store.update(connection, call.workspace_id, id_, change)
            if change.headers is not None:
                await secret_store.set_headers(connection, self._vault, call.workspace_id, id_, change.headers)
            return messages.connection(await store.get(connection, call.workspace_id, id_))

    async def DeleteConnection(self, request: Any, call: Call) -> Empty:
        id_ = UUID(request.id)
        call.target = f"connections/{id_}"
        async with self._change(call) as (connection, _):
            await store.delete(connection, call.workspace_id, id_)
            await secret_store.delete_all(connection, call.workspace_id, id_)
        return Empty()

    @asynccontextmanager
    async def _change(self, call: Call, *, validate_only: bool = False) -> AsyncIterator[tuple["Connection", Event]]:
        """A change, all of whose writes but the event are taken back in the end if it is only to be validated."""
        async with self._recorder.change(call) as (connection, event):
            event.provider = self._webhooks.name
            if validate_only:
                event.reason = "VALIDATE_ONLY"
                await connection.execute("SAVEPOINT validation")
            yield connection, event
            if validate_only:
                await connection.execute("ROLLBACK TO SAVEPOINT validation")

    async def _check_url(self, webhook: connections_pb2.WebhookConfiguration) -> None:
        """Raises what the provider raises, about the fields of an UpdateConnection."""
        try:
            await self._webhooks.check(configuration.stored(webhook))
        except errors.InvalidRequest as error:
            problems = [(f"connection.{field}", problem) for field, problem in error.violations]
            raise errors.InvalidRequest(problems, reason=error.reason) from error

    async def _kept_headers(self, connection: "Connection", workspace_id: UUID, id_: UUID) -> dict[str, str] | None:
        """None: they can't be decrypted."""
        try:
            return await secret_store.get_headers(connection, self._vault, workspace_id, id_)
        except Undecryptable:
            return None


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise errors.InvalidRequest([("connection.id", "should be a UUID")]) from None
