"""ConnectionsService: where a workspace's actions go."""

import json
from typing import Any
from uuid import UUID

import asyncpg
from relay.v1 import connections_pb2

from relay_grpc import errors
from relay_grpc.actions import signing
from relay_grpc.actions.providers import Provider
from relay_grpc.audit.recorder import Recorder
from relay_grpc.call import Call
from relay_grpc.connections import store
from relay_grpc.connections.secrets import Vault
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.paging import page_of


class ConnectionsService:
    """webhooks: the provider that looks a webhook's configuration over."""

    def __init__(self, db: Database, recorder: Recorder, vault: Vault, webhooks: Provider) -> None:
        self._db = db
        self._recorder = recorder
        self._vault = vault
        self._webhooks = webhooks

    async def CreateConnection(self, request: Any, call: Call) -> connections_pb2.Connection:
        configuration = {"url": request.webhook.url, "body_signature": request.webhook.body_signature}
        signing_secret = request.signing_secret or signing.new_secret()
        try:
            secret = signing.decode_secret(signing_secret)
        except ValueError as error:
            raise errors.InvalidRequest([("signing_secret", str(error))]) from None
        await self._webhooks.check(configuration)
        connection_id, secret_id = uuid7(), uuid7()
        sealed = self._vault.seal(
            secret, workspace_id=call.workspace_id, connection_id=connection_id, secret_id=secret_id
        )
        async with self._recorder.change(call) as (connection, event):
            row = await store.insert(
                connection,
                id_=connection_id,
                workspace_id=call.workspace_id,
                name=request.name,
                provider=self._webhooks.name,
                configuration=configuration,
                default=request.default,
            )
            await store.insert_secret(
                connection, id_=secret_id, workspace_id=call.workspace_id, connection_id=connection_id, sealed=sealed
            )
            event.target, event.provider = f"connections/{connection_id}", self._webhooks.name
        message = connection_message(row)
        message.signing_secret = signing_secret
        return message

    async def GetConnection(self, request: Any, call: Call) -> connections_pb2.Connection:
        async with self._db.workspace(call.workspace_id) as connection:
            return connection_message(await store.get(connection, call.workspace_id, UUID(request.id)))

    async def ListConnections(self, request: Any, call: Call) -> connections_pb2.ListConnectionsResponse:
        page = page_of(request, call, UUID)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await store.list_(connection, call.workspace_id, before=page.cursor, limit=page.fetch)
        return page.answer(connections_pb2.ListConnectionsResponse, "connections", rows, connection_message)


def connection_message(row: asyncpg.Record) -> connections_pb2.Connection:
    configuration = json.loads(row["configuration"])
    return connections_pb2.Connection(
        id=str(row["id"]),
        name=row["name"],
        provider=row["provider"],
        version=row["version"],
        enabled=row["enabled"],
        default=row["is_default"],
        webhook=connections_pb2.WebhookConfiguration(
            url=configuration["url"], body_signature=configuration["body_signature"]
        ),
        create_time=row["created_at"],
        update_time=row["updated_at"],
    )
