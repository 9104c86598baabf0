"""`relay limits`: what the operator sets on the database, every server goes by, and the audit log tells."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relay_grpc import datafolder
from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.bootstrap import bootstrap
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.schema import migrate
from tests.harness import Relay, settings_for
from tests.ops.test_cli import Shell
from tests.rpc.wire import Wire, wired

LIMIT = "1000000"  # of the harness


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path, "127.0.0.1:1", "")


@pytest.fixture
async def name(relay: Relay) -> str:
    """Of the tenant's workspace."""
    (row,) = await relay.sql("SELECT name FROM workspaces WHERE id = $1", relay.tenant.workspace_id)
    return str(row["name"])


async def until_told(wire: Wire, limit: str) -> float:
    """Calls until the server tells this limit. Returns the seconds it took."""
    started = time.monotonic()
    while (await wire.call("AuthService.WhoAmI")).trailing["ratelimit-limit"] != limit:
        assert time.monotonic() - started < 10
        await asyncio.sleep(0.02)
    return time.monotonic() - started


async def test_a_limit_that_is_set_is_lived_by_recorded_and_shown(
    relay: Relay, shell: Shell, name: str, figure: Callable[[str], None]
) -> None:
    on_it = {"DATABASE_URL": relay.url}
    async with wired(relay) as wire:
        await until_told(wire, LIMIT)
        changed = await shell("limits", "set", "--workspace", name, "--calls", "1000", "--json", **on_it)
        assert changed.code == 0, changed.err
        assert changed.json == {
            "workspace": name,
            "workspaceId": str(relay.tenant.workspace_id),
            "callsPerMinute": 1000,
            "executionsPerMinute": None,
        }
        took = await until_told(wire, "1000")
        figure(f"told {took:.3f} s after the command")
        assert took < 2.5  # it was pushed: what is believed of a key is believed for 5 s

        mixed = await shell(
            "limits", "set", "--workspace", name, "--calls", "default", "--executions", "7", "--json", **on_it
        )
        assert (mixed.json["callsPerMinute"], mixed.json["executionsPerMinute"]) == (None, 7)
        await until_told(wire, LIMIT)
        shown = await shell("limits", "show", "--workspace", name, **on_it)
        assert shown.out.split()[-3:] == [name, "default", "7"]

    async with relay.connect(relay.tenant.admin) as client:
        events = [event async for event in client.audit.list_events(action="operator.SetLimits")]
    target = f"workspaces/{relay.tenant.workspace_id}"
    assert [(event.target, event.parameters_prefix) for event in events] == [
        (target, '{"calls":null,"executions":7}'),
        (target, '{"calls":1000}'),
    ]
    assert {event.actor.type for event in events} == {4}  # ACTOR_TYPE_OPERATOR


async def test_what_can_not_be_set_is_refused_in_a_sentence_and_changes_nothing(
    relay: Relay, shell: Shell, name: str
) -> None:
    before = await relay.sql("SELECT * FROM workspaces")
    many, nothing, nobody, system, nowhere = await asyncio.gather(
        shell("limits", "set", "--workspace", name, "--calls", "10000001", DATABASE_URL=relay.url),
        shell("limits", "set", "--workspace", name, DATABASE_URL=relay.url),
        shell("limits", "set", "--workspace", "nobody", "--calls", "5", DATABASE_URL=relay.url),
        shell("limits", "set", "--workspace", "system", "--calls", "5", DATABASE_URL=relay.url),
        shell("limits", "show"),
    )
    assert (many.code, "from 1 to 10000000, or default" in many.err) == (2, True)
    assert (nothing.code, "nothing to set" in nothing.err) == (2, True)
    assert (nobody.code, "relay limits show" in nobody.err) == (4, True)
    assert (system.code, "relay limits show" in system.err) == (4, True)
    assert (nowhere.code, "relay serve" in nowhere.err) == (2, True)
    assert await relay.sql("SELECT * FROM workspaces") == before
    assert not await relay.sql(
        "SELECT FROM audit_events WHERE workspace_id = $1 AND action LIKE '%Limits'", SYSTEM_WORKSPACE
    )


async def test_the_embedded_database_is_reached_while_it_is_served_from_and_when_it_is_not(
    shell: Shell, tmp_path: Path
) -> None:
    settings = settings_for(tmp_path)
    here = {"RELAY_DATA_DIR": str(tmp_path)}

    def serve() -> EmbeddedPostgres:
        server = EmbeddedPostgres(tmp_path / datafolder.POSTGRES, durable=False)
        server.start()
        return server

    server = await asyncio.to_thread(serve)
    try:
        await asyncio.to_thread(migrate, server.url())
        await bootstrap(server.url(), settings)
        changed = await shell("limits", "set", "--workspace", "default", "--calls", "5", **here)
        assert changed.code == 0, changed.err
        assert server.alive()
    finally:
        await asyncio.to_thread(server.stop)
    shown = await shell("limits", "show", "--json", **here)
    assert [(one["workspace"], one["callsPerMinute"]) for one in shown.json] == [("default", 5)]
