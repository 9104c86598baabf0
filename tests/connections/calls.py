"""What tests of connections do all the time. client: of relay.aio."""

from typing import Any
from uuid import uuid4

from relay.v1.connections_pb2 import Connection

ELSEWHERE = "http://127.0.0.1:9/elsewhere"  # nobody listens there


async def new(client: Any, url: str, **fields: Any) -> Connection:
    made: Connection = await client.connections.create_webhook(f"connection {uuid4()}", url, **fields)
    made.ClearField("signing_secret")
    return made


async def change(client: Any, connection: Connection, *fields: str, **values: Any) -> Connection:
    """Updates these fields of the connection to the values, whatever its version."""
    changed: Connection = await client.connections.update(Connection(id=connection.id, **values), fields)
    return changed


async def deliver(client: Any, connection_id: str, **payload: object) -> Any:
    """The execution of a webhook with this payload, after its first attempt."""
    preview = await client.actions.preview("webhook.send", {"payload": payload}, connection_id=connection_id)
    return await client.actions.execute(preview)
