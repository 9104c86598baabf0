"""Attempts under leases: fenced, swept, counted, retried, and recorded though the database goes away for a while."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from aiohttp import web
from relay.v1 import actions_pb2

from relay_grpc.actions import lanes, leases, orders
from relay_grpc.actions.execution import RETRY_SCHEDULE
from relay_grpc.app import serving
from tests.actions.caller import Caller, answering, calling, ended_as, eventually, held, received
from tests.harness import Databases, Receiver, Relay, running, settings_for

SUCCESS = actions_pb2.EXECUTION_STATE_SUCCESS
EXECUTING = actions_pb2.EXECUTION_STATE_EXECUTING
PENDING = actions_pb2.EXECUTION_STATE_PENDING
FAILED = actions_pb2.EXECUTION_STATE_FAILED
UNKNOWN = actions_pb2.EXECUTION_STATE_UNKNOWN
LATE = "came after its lease"


async def make_due(relay: Relay, *ids: str) -> None:
    await relay.sql("UPDATE action_executions SET next_attempt_at = now() WHERE id = ANY($1::uuid[])", ids)


async def end_lease(relay: Relay, execution_id: str) -> None:
    await relay.sql("UPDATE action_executions SET lease_until = now() WHERE id = $1", execution_id)


async def outcomes_in_audit_log(caller: Caller, execution_id: str) -> list[str]:
    rows = await caller.relay.sql(
        "SELECT status FROM audit_events WHERE action = 'delivery.attempt' AND target = $1 ORDER BY id",
        f"executions/{execution_id}",
    )
    return [row["status"] for row in rows]


@asynccontextmanager
async def out_of_reach(relay: Relay) -> AsyncIterator[None]:
    """Cuts every connection to the database and lets nobody in."""
    name = urlsplit(relay.url).path[1:]
    elsewhere = await asyncpg.connect(relay.url.replace(name, "relay"))
    try:
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await elsewhere.fetch("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        yield
    finally:
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await elsewhere.close()


async def test_a_worker_that_lost_its_lease_records_nothing(
    relay: Relay, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    release = held(caller.receiver)
    preview = await caller.preview()
    execution = await caller.execute(preview, wait=0)
    await received(caller.receiver, 1)
    await relay.sql("UPDATE action_executions SET lease_token = gen_random_uuid() WHERE id = $1", execution.id)
    before = await caller.executions(preview)
    release.set()
    await eventually(lambda: LATE in caplog.text)
    assert await caller.executions(preview) == before
    assert not await caller.attempts(execution.id)
    assert not await outcomes_in_audit_log(caller, execution.id)


async def test_an_attempt_whose_lease_ran_out_is_made_again_and_only_its_successor_records(
    relay: Relay, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    release = held(caller.receiver)
    execution = await caller.execute(await caller.preview(), wait=0)
    await received(caller.receiver, 1)
    assert (await caller.get(execution.id)).attempt_count == 1, "an attempt counts from its claim on"
    await asyncio.sleep(1)  # timestamps count seconds
    await end_lease(relay, execution.id)
    await received(caller.receiver, 2)
    assert (await caller.get(execution.id)).attempt_count == 2
    release.set()
    await eventually(lambda: LATE in caplog.text)
    ended = await ended_as(caller, execution.id, SUCCESS)
    assert ended.last_attempt.number == 2
    assert await caller.attempts(execution.id) == ["interrupted", "success"]
    assert sorted(await outcomes_in_audit_log(caller, execution.id)) == ["failed", "success"]
    (first, first_body), (second, second_body) = caller.receiver.requests
    assert first["webhook-id"] == second["webhook-id"] == execution.id
    assert first_body == second_body
    assert int(second["webhook-timestamp"]) > int(first["webhook-timestamp"])
    caller.receiver.verify(caller.connection.signing_secret)


@pytest.mark.parametrize("action", ["webhook.send", "webhook.send_once"])
async def test_an_attempt_that_could_outlive_its_lease_is_not_begun(
    databases: Databases, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """The answer to the commit comes when somebody has found the lease run out. What is sent once is not sent then."""
    commit = orders.commit

    async def answer_late(*arguments: Any) -> Any:
        rows = await commit(*arguments)
        await asyncio.sleep(0.6)
        return rows

    settings = settings_for(tmp_path, RELAY_ATTEMPT_TIMEOUT="0.1", RELAY_LEASE="0.3")
    async with databases.new() as url, running(url, settings) as relay, calling(relay, receiver) as caller:
        monkeypatch.setattr(orders, "commit", answer_late)
        execution = await caller.execute(await caller.preview_of(action), wait=0)
        once = action == "webhook.send_once"
        await ended_as(caller, execution.id, UNKNOWN if once else SUCCESS)
        assert await caller.attempts(execution.id) == (["interrupted"] if once else ["interrupted", "success"])
        assert len(receiver.requests) == (0 if once else 1)


async def test_one_that_somebody_holds_does_not_keep_others_from_being_taken_over(relay: Relay, caller: Caller) -> None:
    release = held(caller.receiver)
    held_one, other = [await caller.execute(await caller.preview(), wait=0) for _ in range(2)]
    await received(caller.receiver, 2)
    holder = await asyncpg.connect(relay.url)
    try:
        soon = "UPDATE action_executions SET lease_until = now() + interval '0.3 s' WHERE id = $1"
        await holder.execute(soon, held_one.id)
        async with holder.transaction():
            await holder.fetch("SELECT FROM action_executions WHERE id = $1 FOR UPDATE", held_one.id)
            await asyncio.sleep(0.4)
            await end_lease(relay, other.id)
            await eventually(lambda: caller.attempts(other.id))
    finally:
        await holder.close()
    release.set()
    for execution in (held_one, other):
        await ended_as(caller, execution.id, SUCCESS)


async def test_a_last_attempt_that_is_interrupted_ends_the_execution(relay: Relay, caller: Caller) -> None:
    release = held(caller.receiver)
    execution = await caller.execute(await caller.preview(), wait=0)
    await received(caller.receiver, 1)
    await relay.sql(
        "UPDATE action_executions SET attempt_count = $2 WHERE id = $1", execution.id, len(RETRY_SCHEDULE) + 1
    )
    await end_lease(relay, execution.id)
    ended = await ended_as(caller, execution.id, FAILED)
    assert (ended.attempt_count, ended.last_attempt.number) == (len(RETRY_SCHEDULE) + 1, len(RETRY_SCHEDULE) + 1)
    assert ended.last_attempt.outcome == actions_pb2.ATTEMPT_OUTCOME_INTERRUPTED
    assert ended.HasField("end_time")
    release.set()
    await asyncio.sleep(0.1)
    assert await caller.get(execution.id) == ended
    assert len(caller.receiver.requests) == 1


async def test_the_last_refusal_ends_the_execution(relay: Relay, caller: Caller) -> None:
    answering(caller.receiver, 503)
    execution = await caller.execute(await caller.preview())
    await relay.sql("UPDATE action_executions SET attempt_count = $2 WHERE id = $1", execution.id, len(RETRY_SCHEDULE))
    await make_due(relay, execution.id)
    ended = await ended_as(caller, execution.id, FAILED)
    assert (ended.attempt_count, ended.last_attempt.status_code) == (len(RETRY_SCHEDULE) + 1, 503)


async def test_what_is_due_is_tried_again_until_it_succeeds(relay: Relay, caller: Caller) -> None:
    answering(caller.receiver, 500)
    execution = await caller.execute(await caller.preview())
    for attempt in (2, 3):
        if attempt == 3:
            caller.receiver.answer = None
        await make_due(relay, execution.id)
        await received(caller.receiver, attempt)
        execution = await caller.ended(execution.id)
        assert execution.attempt_count == attempt
    assert execution.state == SUCCESS
    assert await caller.attempts(execution.id) == ["refused", "refused", "success"]
    assert await outcomes_in_audit_log(caller, execution.id) == ["failed", "failed", "success"]
    assert set(caller.receiver.ids()) == {execution.id}


async def test_an_outcome_is_recorded_though_the_database_is_away_when_it_comes(relay: Relay, caller: Caller) -> None:
    release = held(caller.receiver)
    execution = await caller.execute(await caller.preview(), wait=0)
    await received(caller.receiver, 1)
    async with out_of_reach(relay):
        release.set()
        await asyncio.sleep(0.7)
    assert (await ended_as(caller, execution.id, SUCCESS)).attempt_count == 1
    assert caller.receiver.ids() == [execution.id]
    assert await outcomes_in_audit_log(caller, execution.id) == ["success"]


async def test_an_outcome_is_recorded_though_its_row_is_locked_when_it_comes(relay: Relay, caller: Caller) -> None:
    release = held(caller.receiver)
    execution = await caller.execute(await caller.preview(), wait=0)
    await received(caller.receiver, 1)
    holder = await asyncpg.connect(relay.url)
    try:
        async with holder.transaction():
            await holder.fetch("SELECT FROM action_executions WHERE id = $1 FOR UPDATE", execution.id)
            release.set()
            await asyncio.sleep(1.3)  # the wait for a lock ends after a second
    finally:
        await holder.close()
    assert (await ended_as(caller, execution.id, SUCCESS)).attempt_count == 1
    assert caller.receiver.ids() == [execution.id]


async def test_an_outcome_that_the_database_refuses_spoils_no_other_and_breaks_no_answer(
    relay: Relay, caller: Caller
) -> None:
    async def teapot_at_first(_request: web.Request) -> web.Response:
        return web.Response(status=418 if len(caller.receiver.requests) == 1 else 200)

    await relay.sql("ALTER TABLE execution_attempts ADD CONSTRAINT no_tea CHECK (status_code <> 418)")
    try:
        caller.receiver.answer = teapot_at_first
        refused, *others = await asyncio.gather(*[caller.execute(await caller.preview()) for _ in range(5)])
    finally:
        await relay.sql("ALTER TABLE execution_attempts DROP CONSTRAINT no_tea")
    first = caller.receiver.ids()[0]
    executions = {execution.id: execution for execution in (refused, *others)}
    assert executions.pop(first).state == EXECUTING
    assert {execution.state for execution in executions.values()} == {SUCCESS}
    await end_lease(relay, first)
    assert (await ended_as(caller, first, SUCCESS)).attempt_count == 2


async def test_a_secret_that_cannot_be_read_is_not_the_receivers_fault(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    rename = "UPDATE connection_secrets SET encryption_key_id = $2 WHERE connection_id = $1 RETURNING id"
    [secret] = await relay.sql(
        "SELECT encryption_key_id FROM connection_secrets WHERE connection_id = $1", preview.connection_id
    )
    await relay.sql(rename, preview.connection_id, "lost")
    execution = await caller.execute(preview)
    assert execution.state == PENDING
    assert execution.last_attempt.outcome == actions_pb2.ATTEMPT_OUTCOME_UNSENDABLE
    assert "lost" not in execution.last_attempt.error
    assert not caller.receiver.requests
    await relay.sql(rename, preview.connection_id, secret["encryption_key_id"])
    await make_due(relay, execution.id)
    await ended_as(caller, execution.id, SUCCESS)


@asynccontextmanager
async def held_back(caller: Caller) -> AsyncIterator[None]:
    """The breaker of the caller's connection is open in the block, so that what is executed waits."""
    set_breaker = "UPDATE connections SET open_until = now() + $2::interval WHERE id = $1"
    await caller.relay.sql(set_breaker, caller.connection.id, timedelta(hours=1))
    yield
    await caller.relay.sql(set_breaker, caller.connection.id, None)


async def test_two_servers_that_sweep_the_same_rows_make_each_attempt_once(relay: Relay, caller: Caller) -> None:
    async with serving(relay.settings, relay.url):
        async with held_back(caller):
            previews = [await caller.preview() for _ in range(60)]
            executions = await asyncio.gather(*(caller.execute(preview, wait=0) for preview in previews))
            assert {execution.state for execution in executions} == {PENDING}
            holder = await asyncpg.connect(relay.url)
            soon = "UPDATE action_executions SET next_attempt_at = now() + interval '0.3 s' WHERE status = 'pending'"
            await holder.execute(soon)
        async with holder.transaction():
            await holder.fetch("SELECT FROM action_executions WHERE status = 'pending' FOR UPDATE")
            await asyncio.sleep(0.5)  # both have looked, and whoever waits for a row begins when the other does
        await holder.close()
        for execution in executions:
            await ended_as(caller, execution.id, SUCCESS)
    assert sorted(caller.receiver.ids()) == sorted(execution.id for execution in executions)
    for execution in executions:
        assert await caller.attempts(execution.id) == ["success"]


async def test_more_that_is_due_than_can_run_waits_unclaimed(
    databases: Databases, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed work that waits for a slot would lose its lease, and an attempt with it, without having been tried."""
    monkeypatch.setattr(lanes, "MAX_RUNNING", 2)

    async def slowly(_request: web.Request) -> web.Response:
        await asyncio.sleep(0.1)
        return web.Response()

    settings = settings_for(tmp_path, RELAY_ATTEMPT_TIMEOUT="0.3", RELAY_LEASE="0.9")
    async with databases.new() as url, running(url, settings) as relay, calling(relay, receiver) as caller:
        receiver.answer = slowly
        executions = await asyncio.gather(*[caller.execute(await caller.preview(), wait=0) for _ in range(16)])
        assert sorted(execution.attempt_count for execution in executions) == [0] * 15 + [1]
        for execution in executions:
            assert (await ended_as(caller, execution.id, SUCCESS)).attempt_count == 1
        assert sorted(receiver.ids()) == sorted(execution.id for execution in executions)


async def test_a_claim_that_fails_gives_its_room_back(
    databases: Databases, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, failures = leases.claim, [ConnectionResetError(), TimeoutError(), RuntimeError()]

    async def fail_at_first(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return await claim(*arguments)

    settings = settings_for(tmp_path, RELAY_CONNECTION_CONCURRENCY="1")
    async with databases.new() as url, running(url, settings) as relay, calling(relay, receiver) as caller:
        monkeypatch.setattr(leases, "claim", fail_at_first)
        async with held_back(caller):
            executions = [await caller.execute(await caller.preview(), wait=0) for _ in range(3)]
        for execution in executions:
            assert (await ended_as(caller, execution.id, SUCCESS)).attempt_count == 1
    assert not failures


async def test_a_server_that_stops_records_what_it_delivers(
    databases: Databases, tmp_path: Path, receiver: Receiver
) -> None:
    """What it can't wait for is left to the next server, which sends it again under the same id."""
    settings = settings_for(tmp_path)
    async with databases.new() as url:
        release = held(receiver)
        async with running(url, settings) as relay, calling(relay, receiver) as caller:
            soon = await caller.execute(await caller.preview(), wait=0)
            await received(receiver, 1)
            asyncio.get_running_loop().call_later(0.2, release.set)
        assert await caller.attempts(soon.id) == ["success"]

        never_answered = held(receiver)
        async with serving(settings, url) as app, calling(relay, receiver, listen=app.listen) as caller:
            never = await caller.execute(await caller.preview(), wait=0)
            await received(receiver, 2)
        assert not await caller.attempts(never.id)
        never_answered.set()

        receiver.answer = None
        await end_lease(relay, never.id)
        async with serving(settings, url) as app, calling(relay, receiver, listen=app.listen) as caller:
            await ended_as(caller, never.id, SUCCESS)
        assert await caller.attempts(never.id) == ["interrupted", "success"]
        assert receiver.ids() == [soon.id, never.id, never.id]


async def test_what_an_instance_has_no_room_for_is_left_to_another(
    relay: Relay, caller: Caller, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "MAX_RUNNING", 0)
    async with serving(relay.settings, relay.url) as app, calling(relay, receiver, listen=app.listen) as crowded:
        execution = await crowded.execute(await crowded.preview())
    assert (execution.state, execution.attempt_count) == (SUCCESS, 1)
    assert await caller.attempts(execution.id) == ["success"]


async def test_all_that_a_lost_worker_left_is_taken_over_by_the_next_look(
    databases: Databases, tmp_path: Path, receiver: Receiver
) -> None:
    """However much it is: looks are a minute apart here."""
    settings = settings_for(tmp_path, RELAY_SWEEP_INTERVAL="60", RELAY_CONNECTION_CONCURRENCY="256")
    async with databases.new() as url:
        async with running(url, settings) as relay, calling(relay, receiver) as caller, held_back(caller):
            executions = [await caller.execute(await caller.preview(), wait=0) for _ in range(120)]
            await relay.sql(
                """
                    UPDATE action_executions SET status = 'executing', attempt_count = 1, attempt_started_at = now(),
                           next_attempt_at = NULL, lease_token = gen_random_uuid(), lease_until = now()
                    """
            )
        async with serving(settings, url) as app, calling(relay, receiver, listen=app.listen) as caller:
            for execution in executions:
                assert (await ended_as(caller, execution.id, SUCCESS)).attempt_count == 2
