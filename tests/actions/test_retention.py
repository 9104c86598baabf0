"""Retention: what has ended and is old goes, with all that refers to it, and nothing else does."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest
from relay.errors import Contention, NotFound
from relay.v1 import actions_pb2

from relay_grpc.actions.upkeep import Upkeep
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.telemetry import Metrics
from tests.actions.caller import Caller, answer
from tests.harness import Relay

KEPT = timedelta(hours=76)
OLD, YOUNG = "now() - interval '76 hours 1 minute'", "now() - interval '75 hours 59 minutes'"
ENDED = ("success", "failed", "cancelled")


@pytest.fixture(scope="module")
async def db(relay: Relay) -> AsyncIterator[Database]:
    made = await Database.open(relay.url)
    yield made
    await made.close()


def upkeep(db: Database) -> Upkeep:
    return Upkeep(db, Metrics(), retention=KEPT)


async def insert(
    relay: Relay, connection_id: str, count: int, *, status: str = "success", age: str = OLD
) -> list[UUID]:
    """Executions with a preview and an attempt each, that ended, or are due or leased, at this time."""
    ids, ended = [uuid7() for _ in range(count)], status in ENDED
    await relay.sql(
        f"""
        WITH made AS (
          INSERT INTO action_executions
            (id, workspace_id, caller, idempotency_key, fingerprint, preview_id, provider, action_type, action_version,
             connection_id, parameters, traceparent, status, delivery, attempt_count, created_at, completed_at,
             next_attempt_at, lease_token, lease_until)
          SELECT id, $2, 'caller', id::text, '', id, 'independent', 'webhook.send', 1, $3, '{{}}', '',
                 $4::text::execution_state, 'at_least_once', 1, {age}, CASE WHEN $5 THEN {age} END,
                 CASE $4::text WHEN 'pending' THEN now() + interval '1 day' END,
                 CASE $4::text WHEN 'executing' THEN gen_random_uuid() END,
                 CASE $4::text WHEN 'executing' THEN now() + interval '1 day' END
            FROM unnest($1::uuid[]) id RETURNING *
        ), tried AS (
          INSERT INTO execution_attempts
            (execution_id, number, workspace_id, started_at, outcome, status_code, response_excerpt, error)
          SELECT id, 1, workspace_id, {age}, 'success', 200, '', '' FROM made
        )
        INSERT INTO previews
          (id, workspace_id, caller, provider, action_type, action_version, connection_id, connection_version,
           parameters, params_hash, params_prefix, digest, fingerprint, shown, expires_at, execution_id)
        SELECT id, workspace_id, caller, provider, action_type, 1, connection_id, 1, '{{}}', '', '', '', '', '{{}}',
               {age}, id
          FROM made
        """,
        ids,
        relay.tenant.workspace_id,
        UUID(connection_id),
        status,
        ended,
    )
    return ids


async def left(relay: Relay, ids: list[UUID]) -> tuple[int, int, int]:
    """How many of the executions, attempts and previews are still there."""
    (row,) = await relay.sql(
        """
        SELECT (SELECT count(*) FROM action_executions WHERE id = ANY($1)),
               (SELECT count(*) FROM execution_attempts WHERE execution_id = ANY($1)),
               (SELECT count(*) FROM previews WHERE id = ANY($1))
        """,
        ids,
    )
    return tuple(row)


async def test_after_it_nothing_refers_to_what_is_gone_and_the_key_is_free_again(
    relay: Relay, db: Database, caller: Caller
) -> None:
    preview, key = await caller.preview(), uuid4().hex
    execution = await caller.execute(preview, key)
    await upkeep(db).retain()
    assert (await caller.get(execution.id)).state == actions_pb2.EXECUTION_STATE_SUCCESS, "it is not old"

    await relay.sql(f"UPDATE action_executions SET completed_at = {OLD} WHERE id = $1", execution.id)
    await upkeep(db).retain()
    looks = (
        (caller.stub.GetExecution, actions_pb2.GetExecutionRequest(id=execution.id)),
        (caller.stub.ListAttempts, actions_pb2.ListAttemptsRequest(execution_id=execution.id)),
        (caller.stub.GetPreview, actions_pb2.GetPreviewRequest(id=preview.id)),
        (caller.stub.Execute, actions_pb2.ExecuteRequest(preview_id=preview.id, idempotency_key=key)),
    )
    for method, request in looks:
        with pytest.raises(NotFound):
            await answer(method(request, metadata=caller.metadata))
    assert await left(relay, [UUID(execution.id), UUID(preview.id)]) == (0, 0, 0)

    another = await caller.execute(await caller.preview(), key)
    assert (another.state, another.replayed) == (actions_pb2.EXECUTION_STATE_SUCCESS, False)
    assert another.id != execution.id


async def test_only_what_has_ended_goes_and_only_when_its_time_is_over(
    relay: Relay, db: Database, caller: Caller
) -> None:
    going = {status: await insert(relay, caller.connection.id, 3, status=status) for status in ENDED}
    staying = {
        **{status: await insert(relay, caller.connection.id, 3, status=status, age=YOUNG) for status in ENDED},
        **{s: await insert(relay, caller.connection.id, 3, status=s) for s in ("pending", "executing", "unknown")},
    }
    await upkeep(db).retain()
    for status, ids in going.items():
        assert await left(relay, ids) == (0, 0, 0), status
    for status, ids in staying.items():
        assert await left(relay, ids) == (3, 3, 3), status


async def test_a_preview_that_nobody_executed_goes_a_day_after_it_expired(
    relay: Relay, db: Database, caller: Caller
) -> None:
    fresh, expired, old = [await caller.preview() for _ in range(3)]
    for preview, age in ((expired, "23 hours"), (old, "25 hours")):
        await relay.sql(f"UPDATE previews SET expires_at = now() - interval '{age}' WHERE id = $1", preview.id)
    used = await insert(relay, caller.connection.id, 3, age=YOUNG)
    await upkeep(db).retain()
    rows = await relay.sql("SELECT id::text FROM previews WHERE id = ANY($1::uuid[])", [fresh.id, expired.id, old.id])
    assert {row["id"] for row in rows} == {fresh.id, expired.id}
    assert await left(relay, used) == (3, 3, 3)


async def test_recoveries_that_ended_go_too(relay: Relay, db: Database, caller: Caller) -> None:
    ids = [uuid7() for _ in range(3)]
    await relay.sql(
        f"""
        INSERT INTO recoveries (id, workspace_id, start_time, end_time, total_count, last_id, traceparent, completed_at)
        SELECT id, $1, now(), now(), 0, id, '', ended
          FROM unnest($2::uuid[], ARRAY[{OLD}, {YOUNG}, now()]) AS r(id, ended)
        """,
        relay.tenant.workspace_id,
        ids,
    )
    await upkeep(db).retain()
    rows = await relay.sql("SELECT id FROM recoveries WHERE id = ANY($1) ORDER BY id", ids)
    assert [row["id"] for row in rows] == sorted(ids[1:])


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_many_go_in_batches_beside_calls_and_what_somebody_holds_goes_next_time(
    relay: Relay, db: Database, caller: Caller, long: bool, figure: Callable[[str], None]
) -> None:
    """Two instances at once; a call that holds one of the executions; others that execute."""
    count = 50_000 if long else 5_000
    ids = await insert(relay, caller.connection.id, count)
    holder = await asyncpg.connect(relay.url)
    waits = []

    async def execute() -> None:
        preview = await caller.preview()
        before = time.monotonic()
        assert (await caller.execute(preview)).state == actions_pb2.EXECUTION_STATE_SUCCESS
        waits.append(time.monotonic() - before)

    for _ in range(10):
        await execute()
    alone = sorted(waits)[5]
    waits.clear()
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM action_executions WHERE id = $1 FOR UPDATE", ids[count // 2])
            deleting = asyncio.gather(upkeep(db).retain(), upkeep(db).retain())
            before = time.monotonic()
            while not deleting.done():
                await execute()
            took = time.monotonic() - before
            await deleting
            assert await left(relay, ids) == (1, 1, 1)
    finally:
        await holder.close()
    await upkeep(db).retain()
    assert await left(relay, ids) == (0, 0, 0)
    figure(
        f"{count} deleted in {took:.1f} s; an Execute takes {1000 * alone:.0f} ms alone, "
        f"{1000 * max(waits, default=0):.0f} ms at most meanwhile ({len(waits)} of them)"
    )


async def test_an_execute_under_a_key_that_is_going_is_a_replay_or_a_new_execution(
    relay: Relay, db: Database, caller: Caller
) -> None:
    async def execute(preview: actions_pb2.Preview, key: str) -> actions_pb2.Execution:
        """Again where it met the deletion: ABORTED, for which the same key is safe."""
        while True:
            try:
                return await caller.execute(preview, key)
            except Contention:
                await asyncio.sleep(0.01)

    seen: Counter[bool] = Counter()
    for _ in range(20):
        payload, key = {"unique": uuid4().hex}, uuid4().hex
        first = await caller.execute(await caller.preview(**payload), key)
        previews = [await caller.preview(**payload) for _ in range(4)]
        await relay.sql(f"UPDATE action_executions SET completed_at = {OLD} WHERE id = $1", first.id)
        _, *answers = await asyncio.gather(upkeep(db).retain(), *(execute(preview, key) for preview in previews))
        made = {one.id for one in answers if not one.replayed}
        assert len(made) <= 1
        assert {one.id for one in answers} <= made | {first.id}
        rows = await relay.sql("SELECT id::text FROM action_executions WHERE idempotency_key = $1", key)
        assert {row["id"] for row in rows} == made
        seen[bool(made)] += 1
    assert seen[True], "none of the calls came after the deletion"
