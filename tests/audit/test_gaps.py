"""What readers get of a log from which retention took months, or erasure values: before they came, or meanwhile."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from relay import errors

from relay_grpc.audit import erasure, retention
from tests.actions.caller import eventually
from tests.audit.log import export_of, held_of, integrated, verified
from tests.audit.test_export_flow import exporting
from tests.audit.test_retention import log_months, month
from tests.audit.test_tail import Tail, make
from tests.harness import Databases, Relay, Tenant, running, settings_for


@pytest.fixture
async def relay(databases: Databases, data_dir: Path) -> AsyncIterator[Relay]:
    async with databases.new() as url, running(url, settings_for(data_dir)) as server:
        yield server


async def cursor_of(client: Any) -> tuple[str, int]:
    """Where a tail of the log begins now, and the leaf that comes next: that of the tail's own event."""
    tail = Tail(client)
    await eventually(lambda: tail.indices)
    await tail.stop()
    return tail.told[0].cursor, tail.indices[0]


async def drop(relay: Relay, tenant: Tenant, ago: int) -> int:
    """Drops the months before one. Returns the first leaf that the tenant keeps all events from."""
    dropped = await retention.drop(relay.url, month(ago).date())
    await integrated(relay)
    return next(loss.first_kept for loss in dropped.losses if loss.workspace_id == tenant.workspace_id)


async def test_a_tail_goes_on_behind_what_was_dropped_and_says_how_much_that_is(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        await integrated(relay)
        cursor, at = await cursor_of(client)
        await log_months(relay, tenant, (6, 300), (5, 20), (4, 10), (6, 3), (1, 7))  # the three came late
        for ago in (5, 4):  # the second drop takes nothing beyond the first one's end
            kept = await drop(relay, tenant, ago)
            tail = Tail(client, cursor)
            await eventually(lambda tail=tail, kept=kept: len(tail.indices) >= 8)
            await make(client, f"after {ago}")
            await eventually(lambda tail=tail: "CreateConnection" in tail.told[-1].event.action)
            await tail.stop()
            assert tail.told[0].cursor == cursor
            assert tail.indices == list(range(kept, kept + len(tail.indices)))
            assert [message.dropped_count for message in tail.told[1:]] == [kept - at] + [0] * (len(tail.indices) - 1)
            again = Tail(client, tail.told[1].cursor)
            await eventually(lambda again=again: len(again.indices) >= 7)
            await again.stop()
            assert {message.dropped_count for message in again.told} == {0}
            assert again.indices[0] == kept + 1


async def read_on(pieces: Any, read: list[Any]) -> None:
    async for piece in pieces:
        read.append(piece)


async def test_an_export_under_way_breaks_off_where_its_events_are_dropped_and_the_next_is_whole(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    await log_months(relay, tenant, (5, 2000), (1, 30))
    held = await held_of(relay, tenant)
    async with exporting(relay, tenant) as export:
        pieces = export()
        read = [await anext(pieces)]
        kept = await drop(relay, tenant, 4)
        with pytest.raises(grpc.aio.AioRpcError) as end:
            await read_on(pieces, read)
    assert end.value.code() is grpc.StatusCode.ABORTED
    content = b"".join(piece.chunk for piece in read)
    assert 0 < content.count(b"\n") < kept
    assert b'"checkpoint"' not in content, "nothing says that it is whole"
    report = verified(relay, await export_of(relay, tenant), held)
    assert (report.first, report.first_kept) == (kept, kept)


async def test_an_export_that_is_beyond_what_is_dropped_goes_on(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    await log_months(relay, tenant, (5, 10), (1, 2000))
    async with exporting(relay, tenant) as export:
        pieces = export()
        read = [await anext(pieces)]
        await drop(relay, tenant, 4)
        await read_on(pieces, read)
    content = b"".join(piece.chunk for piece in read)
    report = verified(relay, content.splitlines(keepends=True))
    assert (report.first, report.first_kept) == (0, 0)


async def test_a_proof_of_what_was_dropped_has_no_event_to_prove(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    await log_months(relay, tenant, (5, 3))
    (old, *_) = await relay.sql("SELECT id FROM audit_logs WHERE workspace_id = $1 ORDER BY id", tenant.workspace_id)
    async with relay.connect(tenant.admin) as client:
        assert await client.audit.get_inclusion_proof(str(old["id"]))
        await drop(relay, tenant, 4)
        for ask in (client.audit.get_inclusion_proof, client.audit.get_event):
            with pytest.raises(errors.NotFound):
                await ask(str(old["id"]))


async def test_what_is_erased_is_named_by_every_reading_and_shown_by_none(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        cursor, _ = await cursor_of(client)
        key = await client.auth.create_api_key("Jane's 4711", "admin")
        async with relay.connect(key.secret) as jane:
            await jane.connections.create_webhook("hers", "http://127.0.0.1:9/")
        await integrated(relay)
        await erasure.erase(relay.url, erasure.Request("default", key.id), "", lambda *_: None)
        (listed,) = [event async for event in client.audit.list_events(action="ConnectionsService.CreateConnection")]
        tail = Tail(client, cursor)
        await eventually(lambda: listed.id in {message.event.id for message in tail.told})
        await tail.stop()
        (tailed,) = [message.event for message in tail.told if message.event.id == listed.id]
        assert listed == tailed == await client.audit.get_event(listed.id)
    assert (listed.actor.id, listed.actor.name, listed.peer) == ("", "", "")
    assert set(listed.erased_fields) == {"actor_id", "actor_name", "peer"}
    assert listed.target.startswith("connections/")
