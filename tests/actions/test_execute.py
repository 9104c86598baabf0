"""Execute: once per key, only what was previewed, and an answer that is true when it is given."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from relay import errors
from relay.v1 import actions_pb2

from relay_grpc.actions import orders
from relay_grpc.actions.preview import DIGEST_SQL
from relay_grpc.app import serving
from tests.actions.caller import Caller, answer, answering, calling, eventually, held, received
from tests.harness import Databases, Receiver, Relay, receiving, running, settings_for

AT_ONCE = 50
SUCCESS = actions_pb2.EXECUTION_STATE_SUCCESS
EXECUTING = actions_pb2.EXECUTION_STATE_EXECUTING
PENDING = actions_pb2.EXECUTION_STATE_PENDING
FAILED = actions_pb2.EXECUTION_STATE_FAILED


@pytest.fixture
async def callers(relay: Relay, caller: Caller, receiver: Receiver) -> AsyncIterator[list[Caller]]:
    """One caller at two servers of one database."""
    async with (
        serving(relay.settings, relay.url) as other,
        calling(relay, receiver, listen=other.listen) as elsewhere,
    ):
        elsewhere.connection = caller.connection
        yield [caller, elsewhere]


async def all_at_once(
    callers: Sequence[Caller], orders: Sequence[tuple[actions_pb2.Preview, str]]
) -> list[actions_pb2.Execution | BaseException]:
    """Executes previews under keys, going round the callers, so that each server commits them in one batch."""
    dams = [await caller.preview() for caller in callers]
    holder = await asyncpg.connect(callers[0].relay.url)
    async with holder.transaction():
        await holder.fetch("SELECT FROM previews WHERE id = ANY($1::uuid[]) FOR UPDATE", [dam.id for dam in dams])
        dammed = asyncio.gather(*(caller.execute(dam) for caller, dam in zip(callers, dams, strict=True)))
        await eventually(lambda: holder.fetchval("SELECT count(*) = $1 FROM pg_locks WHERE NOT granted", len(dams)))
        answers = asyncio.gather(
            *(callers[n % len(callers)].execute(preview, key) for n, (preview, key) in enumerate(orders)),
            return_exceptions=True,
        )
        await asyncio.sleep(0.2)  # until they have arrived
    await holder.close()
    others = {execution.id for execution in await dammed}
    receiver = callers[0].receiver
    outcomes = await answers
    receiver.requests = [request for request in receiver.requests if request[0]["webhook-id"] not in others]
    return outcomes


async def assert_done_once(
    caller: Caller, previews: Sequence[actions_pb2.Preview], answers: Sequence[actions_pb2.Execution | BaseException]
) -> None:
    [row] = await caller.executions(*previews)
    executions = [one for one in answers if isinstance(one, actions_pb2.Execution)]
    assert len(executions) == len(answers), answers
    assert {execution.id for execution in executions} == {str(row["id"])}
    assert [execution.replayed for execution in executions].count(False) == 1
    await caller.ended(str(row["id"]))
    assert caller.receiver.ids() == [str(row["id"])]
    assert await caller.attempts(str(row["id"])) == ["success"]


@pytest.mark.parametrize("servers", [1, 2])
async def test_one_preview_executed_fifty_times_at_once_runs_once(callers: list[Caller], servers: int) -> None:
    preview = await callers[0].preview()
    answers = await all_at_once(callers[:servers], [(preview, f"same-{servers}")] * AT_ONCE)
    await assert_done_once(callers[0], [preview], answers)


@pytest.mark.parametrize("servers", [1, 2])
async def test_fifty_previews_of_one_request_under_one_key_run_once(callers: list[Caller], servers: int) -> None:
    previews = [await callers[0].preview(order=servers) for _ in range(AT_ONCE)]
    answers = await all_at_once(callers[:servers], [(preview, f"equal-{servers}") for preview in previews])
    await assert_done_once(callers[0], previews, answers)


async def in_step(callers: Sequence[Caller], orders: Sequence[tuple[actions_pb2.Preview, str]]) -> list[Any]:
    """Executes one order at each server; PostgreSQL has begun both statements before it lets either go on."""
    holder = await asyncpg.connect(callers[0].relay.url)
    async with holder.transaction():
        ids = [preview.id for preview, _ in orders]
        await holder.fetch("SELECT FROM previews WHERE id = ANY($1::uuid[]) FOR UPDATE", ids)
        answers = asyncio.gather(
            *(caller.execute(*order) for caller, order in zip(callers, orders, strict=True)), return_exceptions=True
        )
        await eventually(lambda: holder.fetchval("SELECT count(*) = 2 FROM pg_locks WHERE NOT granted"))
    await holder.close()
    return await answers


async def test_two_servers_with_one_preview_under_two_keys_run_it_once(callers: list[Caller]) -> None:
    preview = await callers[0].preview()
    outcomes = await in_step(callers, [(preview, "one-side"), (preview, "other-side")])
    [done] = [outcome for outcome in outcomes if isinstance(outcome, actions_pb2.Execution)]
    [refusal] = [outcome for outcome in outcomes if isinstance(outcome, errors.FailedPrecondition)]
    assert (refusal.reason, refusal.metadata["execution_id"]) == ("PREVIEW_USED", done.id)
    assert callers[0].receiver.ids() == [done.id]


async def test_two_servers_with_one_key_for_two_requests_leave_the_loser_its_preview(callers: list[Caller]) -> None:
    previews = [await callers[0].preview(side=side) for side in range(2)]
    outcomes = await in_step(callers, [(preview, "raced-for") for preview in previews])
    [loser] = [side for side, outcome in enumerate(outcomes) if isinstance(outcome, errors.FailedPrecondition)]
    assert outcomes[loser].reason == "IDEMPOTENCY_KEY_REUSED"
    assert (await callers[loser].execute(previews[loser])).state == SUCCESS
    assert len(callers[0].receiver.ids()) == 2


async def test_in_one_batch_too_the_losers_of_a_race_for_a_key_keep_their_previews(callers: list[Caller]) -> None:
    races = range(10)
    previews = [[await callers[0].preview(race=race, side=side) for side in range(2)] for race in races]
    orders = [(preview, f"race-{race}") for race in races for preview in previews[race]]
    outcomes = await all_at_once(callers[:1], orders)
    for race in races:
        sides = outcomes[2 * race : 2 * race + 2]
        [loser] = [side for side, outcome in enumerate(sides) if isinstance(outcome, errors.FailedPrecondition)]
        assert getattr(sides[loser], "reason", "") == "IDEMPOTENCY_KEY_REUSED"
        assert (await callers[0].execute(previews[race][loser])).state == SUCCESS
    assert len(callers[0].receiver.ids()) == len(set(callers[0].receiver.ids())) == 2 * len(races)


@pytest.mark.parametrize("servers", [1, 2])
async def test_one_preview_under_fifty_keys_runs_once(callers: list[Caller], servers: int) -> None:
    preview = await callers[0].preview()
    outcomes = await all_at_once(callers[:servers], [(preview, f"many-{servers}-{n}") for n in range(AT_ONCE)])
    [done] = [outcome for outcome in outcomes if isinstance(outcome, actions_pb2.Execution)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, errors.FailedPrecondition)]
    assert {refusal.reason for refusal in refused} == {"PREVIEW_USED"}
    assert {refusal.metadata["execution_id"] for refusal in refused} == {done.id}
    assert len(refused) == AT_ONCE - 1
    assert callers[0].receiver.ids() == [done.id]


async def test_crossing_batches_of_two_servers_neither_fail_nor_repeat(callers: list[Caller]) -> None:
    previews = [await callers[0].preview(crossing=n) for n in range(20)]
    crossing = [order for pair in zip(previews, reversed(previews), strict=True) for order in pair]
    outcomes = await all_at_once(callers, [(preview, preview.id) for preview in crossing])
    assert not [one for one in outcomes if isinstance(one, BaseException)]
    assert len(await callers[0].executions(*previews)) == len(previews)
    assert len(callers[0].receiver.ids()) == len(set(callers[0].receiver.ids())) == len(previews)


OTHER_REQUESTS = [{"amount": 2}, {"amount": 1, "to": "b"}, {"amount": "1"}, {"amount": [1]}, {"Amount": 1}, {}]
SAME_REQUESTS = [{"amount": 1}, {"amount": 1.0}]


@pytest.mark.parametrize("payload", OTHER_REQUESTS, ids=str)
async def test_another_request_under_a_used_key_is_refused(caller: Caller, payload: dict[str, Any]) -> None:
    first = await caller.execute(await caller.preview(amount=1), f"used-{payload}".replace(" ", ""))
    other = await caller.preview(**payload)
    for _ in range(2):
        with pytest.raises(errors.FailedPrecondition) as refusal:
            await caller.execute(other, first.idempotency_key)
        assert refusal.value.reason == "IDEMPOTENCY_KEY_REUSED"
    assert caller.receiver.ids() == [first.id]
    assert (await caller.execute(other)).state == SUCCESS


@pytest.mark.parametrize("payload", SAME_REQUESTS, ids=str)
async def test_the_same_request_previewed_again_is_a_replay(caller: Caller, payload: dict[str, Any]) -> None:
    first = await caller.execute(await caller.preview(amount=1), f"again-{payload}".replace(" ", ""))
    again = await caller.execute(await caller.preview(**payload), first.idempotency_key, digest="")
    assert (again.id, again.replayed) == (first.id, True)
    assert caller.receiver.ids() == [first.id]


async def test_another_connection_or_method_under_a_used_key_is_refused(relay: Relay, caller: Caller) -> None:
    first = await caller.execute(await caller.preview(amount=1), "elsewhere")
    put = actions_pb2.PreviewRequest(
        action="webhook.send",
        connection_id=caller.connection.id,
        parameters={"payload": {"amount": 1}, "method": "PUT"},
    )
    others = [await answer(caller.stub.Preview(put, metadata=caller.metadata))]
    async with receiving() as receiver, calling(relay, receiver) as elsewhere:
        others.append(await elsewhere.preview(amount=1))
        for other in others:
            with pytest.raises(errors.FailedPrecondition, match="different request"):
                await caller.execute(other, first.idempotency_key)
        assert not receiver.requests


async def test_previews_of_others_do_not_exist(relay: Relay, caller: Caller, receiver: Receiver) -> None:
    preview = await caller.preview()
    stranger = await relay.new_tenant()
    for key in (relay.tenant.developer, stranger.admin):
        async with calling(relay, receiver, key=relay.tenant.admin) as other:
            other.metadata = (("authorization", f"Bearer {key}"),)
            for used in ("", "someone-elses"):
                with pytest.raises(errors.NotFound):
                    await other.execute(preview, used)
    assert not receiver.requests
    assert (await caller.execute(preview)).state == SUCCESS


async def test_a_key_belongs_to_its_workspace(relay: Relay, caller: Caller, receiver: Receiver) -> None:
    mine = await caller.execute(await caller.preview(amount=1), "shared-key")
    stranger = await relay.new_tenant()
    async with calling(relay, receiver, key=stranger.admin) as other:
        theirs = await other.execute(await other.preview(amount=1), "shared-key")
    assert not theirs.replayed
    assert theirs.id != mine.id


async def expire(relay: Relay, preview: actions_pb2.Preview) -> None:
    await relay.sql("UPDATE previews SET expires_at = now() WHERE id = $1", preview.id)


async def raise_action_version(relay: Relay, preview: actions_pb2.Preview) -> None:
    """As if the preview had been made for another version than that of now."""
    await relay.sql("UPDATE previews SET action_version = action_version + 1 WHERE id = $1", preview.id)
    await relay.sql(f"UPDATE previews p SET digest = {DIGEST_SQL} WHERE id = $1", preview.id)


async def change_parameters(relay: Relay, preview: actions_pb2.Preview) -> None:
    other = """'{"payload":{"amount":1000000}}'"""
    await relay.sql(f"UPDATE previews SET parameters = {other} WHERE id = $1", preview.id)


async def change_connection(relay: Relay, preview: actions_pb2.Preview) -> None:
    await relay.sql("UPDATE connections SET version = version + 1 WHERE id = $1", preview.connection_id)


async def disable_connection(relay: Relay, preview: actions_pb2.Preview) -> None:
    await relay.sql(
        "UPDATE connections SET enabled = false, disabled_reason = 'by hand' WHERE id = $1", preview.connection_id
    )


@pytest.mark.parametrize(
    ("happens", "reason", "fields"),
    [
        (expire, "PREVIEW_EXPIRED", None),
        (raise_action_version, "PREVIEW_DRIFTED", "action_version"),
        (change_parameters, "PREVIEW_DRIFTED", "digest"),
        (change_connection, "PREVIEW_DRIFTED", "connection_version"),
        (disable_connection, "CONNECTION_DISABLED", None),
    ],
)
async def test_what_changed_since_the_preview_is_refused(
    relay: Relay,
    caller: Caller,
    happens: Callable[[Relay, actions_pb2.Preview], Awaitable[None]],
    reason: str,
    fields: str | None,
) -> None:
    preview = await caller.preview()
    await happens(relay, preview)
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await caller.execute(preview, digest="")
    assert (refusal.value.reason, refusal.value.metadata.get("fields")) == (reason, fields)
    assert not await caller.executions(preview)
    assert not caller.receiver.requests


async def test_a_wrong_digest_is_refused_and_leaves_the_preview_and_the_key(caller: Caller) -> None:
    preview = await caller.preview()
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await caller.execute(preview, "digest", digest="0" * 64)
    assert (refusal.value.reason, refusal.value.metadata["fields"]) == ("PREVIEW_DRIFTED", "digest")
    assert not (await caller.execute(preview, "digest")).replayed
    with pytest.raises(errors.FailedPrecondition) as refusal:  # a replay confirms no more than was shown either
        await caller.execute(preview, "digest", digest="0" * 64)
    assert (refusal.value.reason, refusal.value.metadata["fields"]) == ("PREVIEW_DRIFTED", "digest")


async def test_no_server_previews_or_executes_where_actions_are_switched_off(
    relay: Relay, caller: Caller, receiver: Receiver
) -> None:
    preview = await caller.preview()
    settings = relay.settings.model_copy(update={"actions_enabled": False})
    async with serving(settings, relay.url) as app, calling(relay, receiver, listen=app.listen) as other:
        for attempt in (other.preview(), other.execute(preview)):
            with pytest.raises(errors.FailedPrecondition, match="ACTIONS_ENABLED") as refusal:
                await attempt
            assert refusal.value.reason == "ACTION_DISABLED"
    assert not await caller.executions(preview)


async def test_a_preview_that_is_locked_for_a_second_is_contended_and_then_free(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    holder = await asyncpg.connect(relay.url)
    try:
        async with holder.transaction():
            await holder.fetch("SELECT FROM previews WHERE id = $1 FOR UPDATE", preview.id)
            started = time.monotonic()
            with pytest.raises(errors.Contention) as refusal:
                await caller.execute(preview)
            assert 1 <= time.monotonic() - started < 9
            assert refusal.value.retry_after == pytest.approx(0.2)
    finally:
        await holder.close()
    assert (await caller.execute(preview)).state == SUCCESS


async def test_a_deadlock_is_contention(databases: Databases, tmp_path: Path, receiver: Receiver) -> None:
    async with databases.new() as url:
        holder = await asyncpg.connect(url, server_settings={"deadlock_timeout": "10s"})
        # Whoever looks first is the victim: the server, not the test.
        await holder.execute(f"ALTER DATABASE {url.split('/')[3].split('?')[0]} SET deadlock_timeout = '100ms'")
        async with running(url, settings_for(tmp_path)) as relay, calling(relay, receiver) as caller:
            preview = await caller.preview()
            async with holder.transaction():
                await holder.fetch("SELECT FROM connections WHERE id = $1 FOR UPDATE", preview.connection_id)
                execute = asyncio.ensure_future(caller.execute(preview))
                await eventually(lambda: holder.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
                locked = holder.fetch("SELECT FROM previews WHERE id = $1 FOR UPDATE", preview.id)
                with pytest.raises(errors.Contention):
                    await asyncio.gather(execute, locked)
            assert (await caller.execute(preview)).state == SUCCESS
        await holder.close()


async def test_wait_decides_when_execute_answers(caller: Caller) -> None:
    release = held(caller.receiver)
    started = time.monotonic()
    at_once = await caller.execute(await caller.preview(), wait=0)
    assert at_once.state == EXECUTING
    soon = await caller.execute(await caller.preview(), wait=0.2)
    assert soon.state == EXECUTING
    assert time.monotonic() - started >= 0.2
    waits = asyncio.ensure_future(caller.execute(await caller.preview()))
    await received(caller.receiver, 3)
    release.set()
    assert (await waits).state == SUCCESS
    for execution in (at_once, soon):
        assert not execution.HasField("last_attempt")
        assert (await caller.ended(execution.id)).state == SUCCESS
    assert len(caller.receiver.requests) == 3


async def test_a_deadline_that_is_shorter_than_wait_is_kept(caller: Caller) -> None:
    release = held(caller.receiver)
    execution = await caller.execute(await caller.preview(), wait=30, deadline=0.8)
    assert execution.state == EXECUTING
    release.set()
    assert (await caller.ended(execution.id)).state == SUCCESS


async def test_a_receiver_that_fails_is_tried_again_in_five_seconds(caller: Caller) -> None:
    answering(caller.receiver, 503)
    execution = await caller.execute(await caller.preview())
    assert execution.state == PENDING
    attempt = execution.last_attempt
    assert (attempt.number, attempt.outcome, attempt.status_code) == (1, actions_pb2.ATTEMPT_OUTCOME_REFUSED, 503)
    ended = attempt.start_time.ToDatetime() + attempt.duration.ToTimedelta()
    assert 4 <= (execution.next_attempt_time.ToDatetime() - ended).total_seconds() <= 6
    assert not execution.HasField("end_time")


async def test_a_receiver_that_is_gone_ends_it(caller: Caller) -> None:
    answering(caller.receiver, 410)
    execution = await caller.execute(await caller.preview())
    assert (execution.state, execution.last_attempt.status_code) == (FAILED, 410)
    assert execution.HasField("end_time")
    assert not execution.HasField("next_attempt_time")


async def test_redirects_are_not_followed(caller: Caller) -> None:
    async with receiving() as elsewhere:
        answering(caller.receiver, 307, location=elsewhere.url)
        execution = await caller.execute(await caller.preview())
        assert (execution.state, execution.last_attempt.status_code) == (PENDING, 307)
        assert "redirects" in execution.last_attempt.error
        assert not elsewhere.requests


async def test_a_replay_answers_the_execution_as_it_now_is(relay: Relay, caller: Caller) -> None:
    answering(caller.receiver, 503)
    preview = await caller.preview()
    first = await caller.execute(preview)
    assert first.state == PENDING
    caller.receiver.answer = None
    await relay.sql("UPDATE action_executions SET next_attempt_at = now() WHERE id = $1", first.id)
    await received(caller.receiver, 2)
    now = await caller.ended(first.id)
    replay = await caller.execute(preview)
    assert replay.replayed
    replay.ClearField("replayed")
    assert replay == now
    assert (now.state, now.attempt_count) == (SUCCESS, 2)


async def test_keys_and_previews_survive_a_restart(databases: Databases, tmp_path: Path, receiver: Receiver) -> None:
    settings = settings_for(tmp_path)
    async with databases.new() as url:
        async with running(url, settings) as relay, calling(relay, receiver) as caller:
            used, unused = await caller.preview(order=1), await caller.preview(order=2)
            first = await caller.execute(used, "kept")
        async with serving(settings, url) as app, calling(relay, receiver, listen=app.listen) as caller:
            again = await caller.execute(used, "kept")
            assert (again.id, again.replayed, again.state) == (first.id, True, SUCCESS)
            second = await caller.execute(unused)
    assert receiver.ids() == [first.id, second.id]


@pytest.mark.parametrize("action", ["webhook.send", "webhook.send_once"])
async def test_a_commit_whose_answer_is_lost_is_found_and_carried_out_at_once(
    relay: Relay, caller: Caller, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """And it has the one event that is true."""

    async def cut_off_afterwards(connection: Any, *arguments: Any) -> Any:
        await commit(connection, *arguments)
        await relay.sql("SELECT pg_terminate_backend($1)", connection.get_server_pid())
        return await connection.fetch("SELECT")

    commit = orders.commit
    preview = await caller.preview_of(action)
    monkeypatch.setattr(orders, "commit", cut_off_afterwards)
    execution = await caller.execute(preview, request_id=f"cut-off-{action}")
    assert execution.state == SUCCESS
    assert caller.receiver.ids() == [execution.id]
    logged = await relay.sql("SELECT status, reason FROM audit_events WHERE request_id = $1", f"cut-off-{action}")
    assert [tuple(row) for row in logged] == [("success", "")]


@pytest.mark.parametrize("table", ["audit_logs", "audit_values", "audit_pending"])
async def test_without_every_part_of_its_event_nothing_is_done(relay: Relay, caller: Caller, table: str) -> None:
    preview = await caller.preview()
    await relay.sql(f"ALTER TABLE {table} ADD CONSTRAINT refused CHECK (false) NOT VALID")
    try:
        with pytest.raises(errors.Internal):
            await caller.execute(preview)
    finally:
        await relay.sql(f"ALTER TABLE {table} DROP CONSTRAINT refused")
    assert await relay.sql("SELECT FROM action_executions WHERE preview_id = $1", preview.id) == []
    execution = await caller.execute(preview)
    assert caller.receiver.ids() == [execution.id]


async def test_the_default_key_is_the_preview(caller: Caller) -> None:
    preview = await caller.preview()
    first = await caller.execute(preview)
    assert first.idempotency_key == preview.id
    assert (await caller.execute(preview, preview.id)).id == first.id


async def test_a_call_whose_deadline_is_over_does_nothing_twice(caller: Caller) -> None:
    preview = await caller.preview()
    with suppress(errors.DeadlineExceeded):
        await caller.execute(preview, deadline=0.0001)
    execution = await caller.execute(preview)
    await caller.ended(execution.id)
    assert len(await caller.executions(preview)) == 1
    assert caller.receiver.ids() == [execution.id]


async def test_an_attempt_that_breaks_does_not_break_the_answer(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    await relay.sql("UPDATE connections SET configuration = '{}' WHERE id = $1", preview.connection_id)
    assert (await caller.execute(preview)).state == EXECUTING


async def test_nothing_is_sent_unsigned(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    await relay.sql("DELETE FROM connection_secrets WHERE connection_id = $1", preview.connection_id)
    execution = await caller.execute(preview)
    assert (execution.state, execution.last_attempt.outcome) == (PENDING, actions_pb2.ATTEMPT_OUTCOME_UNSENDABLE)
    assert not caller.receiver.requests
