"""Connections that are changed while others change them, disabled, and sent to meanwhile."""

import asyncio
import contextlib
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import web
from relay.errors import Contention, FailedPrecondition, InvalidRequest
from relay.v1.actions_pb2 import EXECUTION_STATE_PENDING, EXECUTION_STATE_SUCCESS
from relay.v1.connections_pb2 import BREAKER_STATE_CLOSED, BREAKER_STATE_HALF_OPEN, BREAKER_STATE_OPEN, Connection

from tests.connections.calls import ELSEWHERE, change, deliver, new
from tests.harness import Receiver, Relay


async def test_of_updates_at_one_version_one_is_done(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url)

    async def update(i: int) -> bool:
        try:
            await change(admin, made, "webhook.url", version=1, webhook={"url": f"http://127.0.0.1:9/{i}"})
        except Contention:
            return False
        return True

    done = await asyncio.gather(*map(update, range(20)))
    assert done.count(True) == 1
    after = await admin.connections.get(made.id)
    assert (after.version, after.webhook.url) == (2, f"http://127.0.0.1:9/{done.index(True)}")


async def test_updates_of_any_version_are_all_done(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url)
    urls = [f"http://127.0.0.1:9/{i}" for i in range(20)]
    answers = await asyncio.gather(*(change(admin, made, "webhook.url", webhook={"url": url}) for url in urls))
    assert sorted(answer.version for answer in answers) == list(range(2, 22))
    assert sorted(answer.webhook.url for answer in answers) == sorted(urls)


async def test_the_default_moves_and_there_is_never_more_than_one(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = [await new(admin, receiver.url) for _ in range(5)]

    async def move(connection: Connection) -> None:
        with contextlib.suppress(Contention):
            await change(admin, connection, "default", default=True)

    await asyncio.gather(*map(move, made * 4))
    await move(made[0])
    defaults = [each.id async for each in admin.connections.list() if each.default]
    assert defaults == [made[0].id]
    preview = await admin.actions.preview("webhook.send", {"payload": {}})
    assert preview.connection_id == made[0].id
    await change(admin, made[0], "default")
    with pytest.raises(InvalidRequest, match="no default connection"):
        await admin.actions.preview("webhook.send", {"payload": {}})


async def test_a_disabled_connection_tells_why_and_delivers_nothing(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url)
    preview = await admin.actions.preview("webhook.send", {"payload": {}}, connection_id=made.id)
    disabled = await change(admin, made, "enabled")
    assert (disabled.enabled, disabled.disabled_reason) == (False, "disabled by its users")
    for refused in (
        admin.actions.execute(preview),
        admin.actions.preview("webhook.send", {"payload": {}}, connection_id=made.id),
    ):
        with pytest.raises(FailedPrecondition) as refusal:
            await refused
        assert refusal.value.reason == "CONNECTION_DISABLED"
    told = await change(admin, made, "disabled_reason", disabled_reason="moving house")
    assert told.disabled_reason == "moving house"
    assert (await change(admin, made, "enabled")).disabled_reason == "moving house"
    assert (await change(admin, made, "disabled_reason")).disabled_reason == "disabled by its users"
    both = await change(admin, made, "enabled", "disabled_reason", disabled_reason="for good")
    assert both.disabled_reason == "for good"
    enabled = await change(admin, made, "enabled", enabled=True)
    assert (enabled.enabled, enabled.disabled_reason) == (True, "")
    assert (await admin.actions.execute(preview)).state == EXECUTION_STATE_SUCCESS


async def test_health_is_told_and_forgotten_when_it_no_longer_holds(
    relay: Relay, admin: Any, receiver: Receiver
) -> None:
    made = await new(admin, receiver.url)

    async def sicken(wait: str) -> Connection:
        await relay.sql(
            """
            UPDATE connections
               SET failures = 12, failing_since = now(), probes = 2, open_until = now() + $2::text::interval
             WHERE id = $1
            """,
            made.id,
            wait,
        )
        found: Connection = await admin.connections.get(made.id)
        assert found.health.consecutive_failures == 12
        assert found.health.HasField("failing_since_time")
        assert found.health.HasField("next_probe_time")
        return found

    assert (await sicken("1 hour")).health.breaker_state == BREAKER_STATE_OPEN
    assert (await sicken("-1 second")).health.breaker_state == BREAKER_STATE_HALF_OPEN
    for fields, values, heals in (
        (["name"], {"name": f"renamed {uuid4()}"}, False),
        (["default"], {"default": True}, False),
        (["enabled"], {"enabled": True}, True),
        (["webhook.url"], {"webhook": {"url": receiver.url}}, False),
        (["webhook.url"], {"webhook": {"url": ELSEWHERE}}, True),
    ):
        await sicken("1 hour")
        health = (await change(admin, made, *fields, **values)).health
        assert (health.breaker_state == BREAKER_STATE_CLOSED) is heals, fields
        assert (health.consecutive_failures == 0) is heals
        assert health.HasField("failing_since_time") is not heals
    (row,) = await relay.sql("SELECT probes FROM connections WHERE id = $1", made.id)
    assert row["probes"] == 0


async def test_what_is_pending_goes_out_as_the_connection_then_is(admin: Any, receiver: Receiver) -> None:
    """The first attempt finds nobody; the next goes to where the connection has been moved to."""
    made = await new(admin, ELSEWHERE, retry_delays=[timedelta(seconds=1)], headers={"x-a": "1"})
    execution = await deliver(admin, made.id)
    assert execution.state == EXECUTION_STATE_PENDING
    await change(
        admin, made, "webhook.url", "webhook.headers", webhook={"url": receiver.url, "headers": {"x-a": "", "x-b": "2"}}
    )
    async for each in admin.actions.watch_execution(execution.id):
        execution = each
    assert execution.state == EXECUTION_STATE_SUCCESS
    ((headers, _),) = receiver.requests
    assert (headers["x-a"], headers["x-b"]) == ("1", "2")


async def test_deliveries_go_on_while_a_connection_is_changed(admin: Any, receiver: Receiver) -> None:
    """Each carries the URL and the headers of one version: never those of two."""
    made = await new(admin, f"{receiver.url}/0", headers={"x-version": "0"})
    seen: list[tuple[str, str]] = []

    async def note(request: web.Request) -> web.Response:
        seen.append((request.headers["x-version"], request.path))
        return web.Response()

    receiver.answer = note

    async def update() -> None:
        for i in range(1, 21):
            webhook = {"url": f"{receiver.url}/{i}", "headers": {"x-version": str(i)}}
            await change(admin, made, "webhook.url", "webhook.headers", webhook=webhook)

    updating = asyncio.create_task(update())
    delivered = 0
    while not updating.done() or delivered == 0:
        try:
            assert (await deliver(admin, made.id)).state == EXECUTION_STATE_SUCCESS
            delivered += 1
        except FailedPrecondition as drifted:
            assert drifted.reason == "PREVIEW_DRIFTED"  # noqa: PT017
    await updating
    assert set(seen) <= {(str(i), f"/hook/{i}") for i in range(21)}
