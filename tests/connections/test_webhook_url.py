"""The connection of WEBHOOK_URL and ACTIONS_SIGNING_SECRET: the settings' own, and for the rest its users'."""

import asyncio
import base64
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
from relay.v1.connections_pb2 import Connection

from relay_grpc.bootstrap import bootstrap
from tests.actions.caller import eventually
from tests.connections.calls import deliver
from tests.harness import Databases, Receiver, Relay, running, settings_for

FIRST, SECOND = "first" * 6, "second" * 5
WAITING = "SELECT pid FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"


def told(secret: str) -> str:
    return f"whsec_{base64.b64encode(secret.encode()).decode()}"


async def named(client: Any) -> list[Connection]:
    return [each async for each in client.connections.list() if each.name == "WEBHOOK_URL"]


async def test_settings_win_and_the_rest_stays(databases: Databases, receiver: Receiver, tmp_path: Path) -> None:
    environ = {"WEBHOOK_URL": receiver.url, "ACTIONS_SIGNING_SECRET": FIRST}
    settings = settings_for(tmp_path, **environ)
    async with databases.new() as url, running(url, settings) as relay, relay.connect(relay.tenant.admin) as client:
        (made,) = await named(client)
        assert (made.default, made.webhook.body_signature, made.version) == (True, True, 1)
        made.webhook.headers["Authorization"] = "Bearer x"
        made.webhook.timeout.FromTimedelta(timedelta(seconds=3))
        made.name = ""
        changed = await client.connections.update(made, ["webhook.headers", "webhook.timeout"])
        await bootstrap(url, settings)
        assert await named(client) == [changed]
        moved = Connection(id=made.id, webhook={"url": "http://127.0.0.1:9/"})
        await client.connections.update(moved, ["webhook.url", "default"])
        await client.connections.rotate_secret(made.id)
        await bootstrap(url, settings)
        (again,) = await named(client)
        assert (again.id, again.webhook, again.default) == (made.id, changed.webhook, True)
        await deliver(client, made.id)
        receiver.verify(told(FIRST))
        await bootstrap(url, settings_for(tmp_path, **environ | {"ACTIONS_SIGNING_SECRET": SECOND}))
        receiver.requests.clear()
        await deliver(client, made.id)
        receiver.verify(told(SECOND))
        ((headers, _),) = receiver.requests
        assert headers["webhook-signature"].count("v1,") == 1
        assert headers["authorization"] == "Bearer x"
        await client.connections.delete(made.id)
        await bootstrap(url, settings)
        (new,) = await named(client)
        assert (new.id != made.id, new.version, new.default) == (True, 1, True)


async def test_a_rotation_under_way_leaves_no_secret_beside_the_setting_s(
    databases: Databases, receiver: Receiver, tmp_path: Path
) -> None:
    environ = {"WEBHOOK_URL": receiver.url, "ACTIONS_SIGNING_SECRET": FIRST}
    async with databases.new() as url, running(url, settings_for(tmp_path, **environ)) as relay:
        rotating = await asyncpg.connect(url)
        async with rotating.transaction():
            await rotating.execute("SELECT FROM connections FOR NO KEY UPDATE")
            await rotating.execute(
                """
                INSERT INTO connection_secrets
                  (id, workspace_id, connection_id, encryption_key_id, wrapped_key, ciphertext)
                SELECT gen_random_uuid(), workspace_id, connection_id, encryption_key_id, wrapped_key, ciphertext
                  FROM connection_secrets
                """
            )
            await rotating.execute("UPDATE connection_secrets SET expires_at = now() + interval '1 day'")
            changed = settings_for(tmp_path, **environ | {"ACTIONS_SIGNING_SECRET": SECOND})
            starting = asyncio.create_task(bootstrap(url, changed))
            await eventually(lambda: rotating.fetch(WAITING))
        await starting
        await rotating.close()
        async with relay.connect(relay.tenant.admin) as client:
            (connection,) = await named(client)
        assert len(connection.signing_keys) == 1


async def test_no_other_workspace_has_it(databases: Databases, receiver: Receiver, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, WEBHOOK_URL=receiver.url, ACTIONS_SIGNING_SECRET=FIRST)
    async with databases.new() as url, running(url, settings) as relay:
        other = await relay.new_tenant()
        assert await _count(relay, relay.tenant.admin) == 1
        assert await _count(relay, other.admin) == 0


async def _count(relay: Relay, key: str) -> int:
    async with relay.connect(key) as client:
        return len(await named(client))
