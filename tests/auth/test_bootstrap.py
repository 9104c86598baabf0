"""The first workspace and keys, and the connection that WEBHOOK_URL makes in it and in no other."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from relay_grpc.auth import keys
from relay_grpc.bootstrap import Bootstrapped, bootstrap
from relay_grpc.db import DatabaseUnusable
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.owner import as_owner
from relay_grpc.settings import Settings
from tests.harness import Databases, OnDatabase, Receiver, running, settings_for

SECRET = "a secret of 24 to 64 characters"


@dataclass
class Operator(OnDatabase):
    """Somebody with a database of their own and its password."""

    url: str
    folder: Path

    def settings(self, **environ: str) -> Settings:
        return settings_for(self.folder, **environ)

    async def starts(self, webhook_url: str = "", secret: str = SECRET, **options: Any) -> Bootstrapped:
        environ = {"WEBHOOK_URL": webhook_url, "ACTIONS_SIGNING_SECRET": secret} if webhook_url else {}
        return await bootstrap(self.url, self.settings(**environ), **options)

    async def everything(self) -> dict[str, list[asyncpg.Record]]:
        tables = ("workspaces", "api_keys", "connections", "connection_secrets", "audit_logs", "audit_values")
        return {table: await self.sql(f"SELECT * FROM {table} ORDER BY id") for table in tables}


@pytest.fixture
async def operator(databases: Databases, tmp_path: Path) -> AsyncIterator[Operator]:
    async with databases.new() as url:
        yield Operator(url, tmp_path)


async def test_the_first_start_makes_a_workspace_and_two_keys_that_are_told_once(operator: Operator) -> None:
    first = await operator.starts()
    assert set(first.keys) == {"admin", "developer"}
    assert all(keys.public_id_of(key) for key in first.keys.values())
    stored = await operator.everything()
    second = await operator.starts()
    assert second == Bootstrapped(first.workspace_id, {})
    assert await operator.everything() == stored
    assert [key for key in first.keys.values() if key in str(stored)] == []
    third = await operator.starts(new_keys=True)
    assert third.workspace_id == first.workspace_id
    assert not set(third.keys.values()) & set(first.keys.values())


async def test_every_step_of_the_operator_is_in_the_audit_log(operator: Operator) -> None:
    made = await operator.starts("https://receiver.example/hook")
    events = await operator.sql("SELECT * FROM audit_events ORDER BY id")
    assert [event["action"] for event in events] == [
        "operator.CreateWorkspace",
        "operator.CreateApiKey",
        "operator.CreateApiKey",
        "operator.SetDefaultConnection",
    ]
    assert {(event["actor_type"], event["workspace_id"]) for event in events} == {("operator", made.workspace_id)}


async def test_the_webhook_url_makes_a_connection_of_the_first_workspace_alone(
    operator: Operator, receiver: Receiver
) -> None:
    environ = {"WEBHOOK_URL": receiver.url, "ACTIONS_SIGNING_SECRET": SECRET}
    async with running(operator.url, operator.settings(**environ)) as relay:
        other = await relay.new_tenant()
        async with relay.connect(relay.tenant.developer) as client:
            (connection,) = [one async for one in client.connections.list()]
            assert (connection.name, connection.default, connection.webhook.url) == ("WEBHOOK_URL", True, receiver.url)
            preview = await client.actions.preview("webhook.send", {"payload": {}})
            assert (await client.actions.execute(preview)).last_attempt.status_code == 200
        async with relay.connect(other.admin) as client:
            assert [one async for one in client.connections.list()] == []
        ((headers, _),) = receiver.requests
        assert headers["x-signature"].startswith("sha256=")
        assert SECRET not in str(await operator.everything())


async def test_a_second_start_with_the_same_values_changes_nothing(operator: Operator) -> None:
    await operator.starts("https://receiver.example/hook")
    before = await operator.everything()
    await operator.starts("https://receiver.example/hook")
    await operator.starts()  # nor does one without them
    assert await operator.everything() == before


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("https://receiver.example/moved", SECRET),
        ("https://receiver.example/hook", SECRET + "!"),
        ("https://receiver.example/hook", "whsec_" + "QUJDRA" * 8),
    ],
)
async def test_another_url_or_secret_is_another_version_of_the_same_connection(
    operator: Operator, url: str, secret: str
) -> None:
    await operator.starts("https://receiver.example/hook")
    before = await operator.everything()
    await operator.starts(url, secret)
    after = await operator.everything()
    ((old,), (new,)) = before["connections"], after["connections"]
    assert (new["id"], old["version"], new["version"]) == (old["id"], 1, 2)
    assert json.loads(new["configuration"])["url"] == url
    assert len(after["connection_secrets"]) == 1
    assert after["connection_secrets"] != before["connection_secrets"]
    assert len(after["audit_logs"]) == len(before["audit_logs"]) + 1


async def test_two_first_starts_at_once_make_one_first_workspace(operator: Operator) -> None:
    made = await asyncio.gather(*(operator.starts("https://receiver.example/hook") for _ in range(3)))
    assert len({one.workspace_id for one in made}) == 1
    assert sorted(len(one.keys) for one in made) == [0, 0, 2]
    assert len((await operator.everything())["connections"]) == 1


async def test_a_database_without_relay_is_told_from_one_that_is_not_there(
    postgres: EmbeddedPostgres, operator: Operator
) -> None:
    with pytest.raises(DatabaseUnusable, match="run `relay migrate`"):
        await bootstrap(postgres.url(), operator.settings())
    with pytest.raises(DatabaseUnusable, match="check DATABASE_URL"):
        await bootstrap(postgres.url("nowhere"), operator.settings())
    with pytest.raises(DatabaseUnusable) as caught:
        await bootstrap("postgresql://relay:planted-secret@127.0.0.1:1/relay", operator.settings())
    assert "planted-secret" not in str(caught.value)


async def test_a_connection_that_is_cut_is_told_in_a_sentence(operator: Operator) -> None:
    async def cut() -> None:
        async with as_owner(operator.url) as connection:
            await operator.sql(f"SELECT pg_terminate_backend({connection.get_server_pid()}, 5000)")
            await connection.execute("SELECT")

    with pytest.raises(DatabaseUnusable, match="ended the connection"):
        await cut()
