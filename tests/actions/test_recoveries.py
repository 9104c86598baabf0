"""Recoveries: what failed in a range of time is delivered again, each once, whatever happens meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest
from relay.errors import Contention, InvalidRequest, NotFound
from relay.v1 import actions_pb2, actions_pb2_grpc

from relay_grpc.actions.recovery_store import BATCH
from relay_grpc.actions.upkeep import Upkeep
from relay_grpc.db import Database
from relay_grpc.ids import first_uuid7
from relay_grpc.telemetry import Metrics
from tests.actions.caller import answer, answering, calling, eventually, received
from tests.harness import Databases, OnDatabase, Receiver, Relay, Tenant, running, settings_for
from tests.ops.test_cli import Shell
from tests.processes import started

START = datetime(2026, 1, 31, tzinfo=UTC)


@dataclass
class Failures(OnDatabase):
    """Failed executions of a workspace, one made each millisecond from START on; what they wait for is a halt's end.

    url: of the database, as its superuser. ids: oldest first.
    """

    url: str
    workspace_id: UUID
    connection_id: UUID
    ids: list[UUID]

    async def resent(self) -> dict[int, int]:
        """How many of them were sent anew how often; those that were are pending, with all their attempts anew."""
        rows = await self.sql(
            """
            SELECT resend_count, count(*) AS n, bool_and(
                     CASE resend_count WHEN 0 THEN status = 'failed' AND completed_at IS NOT NULL
                     ELSE status = 'pending' AND next_attempt_at <= now() AND attempts_before = attempt_count
                          AND cancel_requested_at IS NULL END) AS right
              FROM action_executions WHERE id = ANY($1) GROUP BY resend_count
            """,
            self.ids,
        )
        assert all(row["right"] for row in rows), rows
        return {row["resend_count"]: row["n"] for row in rows}

    async def events(self, recovery: actions_pb2.Recovery) -> list[str]:
        rows = await self.sql(
            "SELECT action FROM audit_events"
            " WHERE workspace_id = $1 AND target = $2 AND status = 'success' ORDER BY id",
            self.workspace_id,
            f"recoveries/{recovery.id}",
        )
        return [row["action"] for row in rows]

    @asynccontextmanager
    async def held_up(self, number: int) -> AsyncIterator[None]:
        """A recovery that comes to this one of them waits there."""
        connection = await asyncpg.connect(self.url)
        try:
            async with connection.transaction():
                await connection.execute("SELECT FROM action_executions WHERE id = $1 FOR UPDATE", self.ids[number])
                yield
        finally:
            await connection.close()


async def failed(url: str, workspace_id: UUID, count: int, **columns: Any) -> Failures:
    """Puts them there, with a connection of their own. columns: of the connection, other than as usual."""
    made = Failures(url, workspace_id, uuid4(), [])
    made.ids = [
        UUID(int=first_uuid7(START + timedelta(milliseconds=n)).int | uuid4().int % 2**62 | 0x7 << 76 | 0x2 << 62)
        for n in range(count)
    ]
    await made.sql(
        "INSERT INTO halts (workspace_id, provider, reason) VALUES ($1, '', 'a test') ON CONFLICT DO NOTHING",
        workspace_id,
    )
    await made.sql(
        "INSERT INTO connections (id, workspace_id, name, provider, configuration)"
        " VALUES ($1, $2, $3, 'independent', '{}')",
        made.connection_id,
        workspace_id,
        str(made.connection_id),
    )
    await made.sql(
        """
        INSERT INTO action_executions
          (id, workspace_id, caller, idempotency_key, fingerprint, preview_id, provider, action_type, action_version,
           connection_id, parameters, traceparent, status, delivery, attempt_count, created_at, completed_at,
           cancel_requested_at)
        SELECT id, $2, 'caller', id::text, '', gen_random_uuid(), 'independent', 'webhook.send', 1, $3, '{}',
               '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01', 'failed', 'at_least_once', 8, $4, now(), now()
          FROM unnest($1::uuid[]) id
        """,
        made.ids,
        workspace_id,
        made.connection_id,
        START,
    )
    for column, value in columns.items():
        await made.sql(f"UPDATE connections SET {column} = {value} WHERE id = $1", made.connection_id)
    return made


@dataclass
class Recoverer:
    """A caller of the RPCs about recoveries."""

    stub: Any
    metadata: tuple[tuple[str, str], ...]
    workspace_id: UUID

    async def recover(
        self,
        start: datetime = START,
        end: datetime | None = None,
        connection_id: UUID | None = None,
        *,
        validate_only: bool = False,
    ) -> actions_pb2.Recovery:
        request = actions_pb2.RecoverExecutionsRequest(
            start_time=start,
            end_time=end,
            connection_id=str(connection_id) if connection_id else "",
            validate_only=validate_only,
        )
        return await answer(self.stub.RecoverExecutions(request, metadata=self.metadata))

    async def get(self, id_: str) -> actions_pb2.Recovery:
        return await answer(self.stub.GetRecovery(actions_pb2.GetRecoveryRequest(id=id_), metadata=self.metadata))

    async def cancel(self, id_: str) -> actions_pb2.Recovery:
        """Again, where a batch is under way."""
        while True:
            try:
                return await answer(
                    self.stub.CancelRecovery(actions_pb2.CancelRecoveryRequest(id=id_), metadata=self.metadata)
                )
            except Contention:
                await asyncio.sleep(0.1)

    async def until(self, recovery: actions_pb2.Recovery, count: int) -> actions_pb2.Recovery:
        """The recovery, once it has handed over so many."""

        async def so() -> actions_pb2.Recovery | None:
            seen = await self.get(recovery.id)
            return seen if seen.recovered_count >= count else None

        return await eventually(so)

    async def ended(self, recovery: actions_pb2.Recovery, within: float = 60) -> actions_pb2.Recovery:
        async with asyncio.timeout(within):
            while not (seen := await self.get(recovery.id)).HasField("end_time"):
                await asyncio.sleep(0.02)
        return seen


@asynccontextmanager
async def recovering(listen: object, tenant: Tenant) -> AsyncIterator[Recoverer]:
    options = (("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0))
    async with grpc.aio.insecure_channel(str(listen), options) as channel:
        stub = actions_pb2_grpc.ActionsServiceStub(channel)
        yield Recoverer(stub, (("authorization", f"Bearer {tenant.admin}"),), tenant.workspace_id)


@pytest.fixture
async def recoverer(relay: Relay) -> AsyncIterator[Recoverer]:
    """Of a workspace of its own."""
    async with recovering(relay.app.listen, await relay.new_tenant()) as made:
        yield made


async def test_a_range_is_counted_and_recovered_and_nothing_beside_it(relay: Relay, recoverer: Recoverer) -> None:
    ours = await failed(relay.url, recoverer.workspace_id, 1000)
    other = await failed(relay.url, recoverer.workspace_id, 100)
    left = [
        await failed(relay.url, recoverer.workspace_id, 10, enabled="false, disabled_reason = 'a test'"),
        await failed(relay.url, recoverer.workspace_id, 10, enabled="false, disabled_reason = 'd', deleted_at = now()"),
        await failed(relay.url, relay.tenant.workspace_id, 10),
    ]
    unknown = await failed(relay.url, recoverer.workspace_id, 10)
    await relay.sql("UPDATE action_executions SET action_type = 'gone.by' WHERE id = ANY($1)", unknown.ids)
    succeeded, *_ = ours.ids[500:]
    await relay.sql("DELETE FROM action_executions WHERE id = $1", succeeded)
    ours.ids.remove(succeeded)

    def at(milliseconds: int) -> datetime:
        return START + timedelta(milliseconds=milliseconds)

    async def count(*range_: Any) -> int:
        found = await recoverer.recover(*range_, validate_only=True)
        assert (found.id, found.HasField("create_time")) == ("", False)
        return found.total_count

    assert await count() == 999 + 100
    assert await count(START, None, ours.connection_id) == 999
    assert await count(at(10), at(20), ours.connection_id) == 10, "the start is in it, the end is not"
    assert await count(at(10), at(20)) == 20
    assert await count(at(1000)) == 0
    assert await ours.resent() == {0: 999}

    def logged() -> float:
        return relay.app.metrics.registry.get_sample_value("relay_audit_events_total", {"outcome": "success"}) or 0

    before = logged()
    recovery = await recoverer.recover(at(10), at(900), ours.connection_id)
    assert (recovery.total_count, recovery.recovered_count, recovery.cancelled) == (889, 0, False)
    ended = await recoverer.ended(recovery)
    assert (ended.recovered_count, ended.cancelled) == (889, False)
    assert await ours.resent() == {0: 110, 1: 889}
    assert await ours.events(ended) == ["ActionsService.RecoverExecutions", "recovery.ended"]
    await eventually(lambda: logged() == before + 2)
    assert await count(START, None, ours.connection_id) == 110
    for one in (other, *left, unknown):
        assert await one.resent() == {0: len(one.ids)}
    reasons = await relay.sql(
        "SELECT DISTINCT reason, target FROM audit_events WHERE workspace_id = $1 AND reason <> ''",
        recoverer.workspace_id,
    )
    assert {tuple(row) for row in reasons} == {
        ("VALIDATE_ONLY", ""),
        ("VALIDATE_ONLY", f"connections/{ours.connection_id}"),
    }


async def test_what_fails_again_meanwhile_is_left_to_the_next_recovery(relay: Relay, recoverer: Recoverer) -> None:
    ours = await failed(relay.url, recoverer.workspace_id, 3 * BATCH)
    late = ours.ids[-1]
    await relay.sql("UPDATE action_executions SET resend_count = 5 WHERE id = $1", late)
    async with ours.held_up(BATCH):
        recovery = await recoverer.recover()
        await recoverer.until(recovery, BATCH)
        await relay.sql("UPDATE action_executions SET completed_at = now() WHERE id = $1", late)
        failing_again = "UPDATE action_executions SET status = 'executing', next_attempt_at = NULL,"
        failing_again += " lease_token = gen_random_uuid(), lease_until = now() + interval '1 hour' WHERE id = $1"
        await relay.sql(failing_again, ours.ids[0])
        await relay.sql(
            "UPDATE action_executions SET status = 'failed', completed_at = now(), lease_token = NULL,"
            " lease_until = NULL WHERE id = $1",
            ours.ids[0],
        )
    ended = await recoverer.ended(recovery)
    assert ended.recovered_count == 3 * BATCH - 1
    rows = await relay.sql(
        "SELECT resend_count FROM action_executions WHERE id = ANY($1) ORDER BY id", [ours.ids[0], late]
    )
    assert [row["resend_count"] for row in rows] == [1, 5]
    assert (await recoverer.recover(validate_only=True)).total_count == 2


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_many_are_recovered_without_a_cap_and_the_progress_is_told(
    relay: Relay, recoverer: Recoverer, long: bool, figure: Callable[[str], None]
) -> None:
    ours = await failed(relay.url, recoverer.workspace_id, 50_000 if long else 5_000)
    started_at = time.monotonic()
    recovery = await recoverer.recover()
    counted = time.monotonic() - started_at
    assert recovery.total_count == len(ours.ids)
    progress = [0]
    while progress[-1] < len(ours.ids):
        seen = await recoverer.get(recovery.id)
        assert progress[-1] <= seen.recovered_count <= len(ours.ids)
        assert seen.recovered_count % BATCH == 0
        if seen.recovered_count > progress[-1]:
            progress.append(seen.recovered_count)
    await recoverer.ended(recovery)
    took = time.monotonic() - started_at - counted
    figure(f"{len(ours.ids)} counted in {counted:.2f} s, recovered in {took:.1f} s; {len(progress) - 1} steps seen")
    assert await ours.resent() == {1: len(ours.ids)}


async def test_a_recovery_that_is_cancelled_stops_where_it_is(relay: Relay, recoverer: Recoverer) -> None:
    ours = await failed(relay.url, recoverer.workspace_id, 5_000)
    async with ours.held_up(2_500):
        recovery = await recoverer.recover()
        await recoverer.until(recovery, 2_400)
        stopped = await recoverer.cancel(recovery.id)
    assert (stopped.recovered_count, stopped.cancelled, stopped.HasField("end_time")) == (2_400, True, True)
    await asyncio.sleep(1.5)  # longer than until upkeep looks again
    assert await recoverer.cancel(recovery.id) == stopped
    assert await ours.resent() == {1: 2_400, 0: 2_600}
    assert await ours.events(recovery) == [
        "ActionsService.RecoverExecutions",
        "ActionsService.CancelRecovery",
        "ActionsService.CancelRecovery",
    ]
    rest = await recoverer.ended(await recoverer.recover())
    assert (rest.total_count, rest.recovered_count) == (2_600, 2_600)
    assert await ours.resent() == {1: 5_000}


async def test_one_that_is_held_up_holds_up_no_other(relay: Relay, recoverer: Recoverer) -> None:
    ours = await failed(relay.url, recoverer.workspace_id, 10)
    async with recovering(relay.app.listen, await relay.new_tenant()) as neighbour:
        theirs = await failed(relay.url, neighbour.workspace_id, 10 * BATCH)
        async with ours.held_up(5):
            held = await recoverer.recover()
            await neighbour.ended(await neighbour.recover())
            assert await theirs.resent() == {1: 10 * BATCH}
            assert (await recoverer.get(held.id)).recovered_count == 0
    await recoverer.ended(held)
    assert await ours.resent() == {1: 10}


async def test_a_recovery_whose_process_is_killed_midway_is_carried_on_by_the_next_one(
    databases: Databases, tmp_path: Path
) -> None:
    async with databases.new() as url:
        async with running(url, settings_for(tmp_path)) as relay:
            tenant = relay.tenant
            ours = await failed(url, tenant.workspace_id, 5_000)
        async with started(url, tmp_path) as first:
            async with ours.held_up(2_500), recovering(first.listen, tenant) as recoverer:
                recovery = await recoverer.recover()
                await recoverer.until(recovery, 2_400)
                first.kill()
                await first.process.wait()
            assert await ours.resent() == {1: 2_400, 0: 2_600}
        async with started(url, tmp_path) as second, recovering(second.listen, tenant) as recoverer:
            ended = await recoverer.ended(recovery)
            assert (ended.total_count, ended.recovered_count) == (5_000, 5_000)
            assert await ours.resent() == {1: 5_000}
            assert await ours.events(ended) == ["ActionsService.RecoverExecutions", "recovery.ended"]


async def test_instances_that_recover_side_by_side_resend_each_once(relay: Relay, recoverer: Recoverer) -> None:
    ours = await failed(relay.url, recoverer.workspace_id, 5_000)
    async with AsyncExitStack() as stack:
        instances = []
        for _ in range(4):
            db = await Database.open(relay.url)
            stack.push_async_callback(db.close)
            instances.append(Upkeep(db, Metrics(), retention=timedelta(hours=76)))
        recovery = await recoverer.recover()

        async def work(instance: Upkeep) -> None:
            while not (await recoverer.get(recovery.id)).HasField("end_time"):
                await instance.recover()

        await asyncio.gather(*map(work, instances))
    assert (await recoverer.get(recovery.id)).recovered_count == 5_000
    assert await ours.resent() == {1: 5_000}
    assert await ours.events(recovery) == ["ActionsService.RecoverExecutions", "recovery.ended"]


async def test_what_is_recovered_is_delivered_under_the_same_id_with_all_its_attempts_anew(
    relay: Relay, receiver: Receiver
) -> None:
    tenant = await relay.new_tenant()  # that nobody halted
    async with (
        calling(relay, receiver, key=tenant.admin) as caller,
        recovering(relay.app.listen, tenant) as recoverer,
    ):
        await relay.sql(
            "UPDATE connections SET configuration = configuration || '{\"retry_delays\": []}' WHERE id = $1",
            caller.connection.id,
        )
        began = datetime.now(UTC) - timedelta(seconds=1)
        answering(receiver, 503)
        executions = [await caller.execute(await caller.preview()) for _ in range(3)]
        assert {one.state for one in executions} == {actions_pb2.EXECUTION_STATE_FAILED}
        receiver.answer = None
        recovery = await recoverer.recover(began, None, UUID(caller.connection.id))
        await received(receiver, 6)
        assert (await recoverer.ended(recovery)).recovered_count == 3
        assert sorted(receiver.ids()[3:]) == sorted(one.id for one in executions)
        for one in executions:
            again = await caller.ended(one.id)
            assert (again.state, again.attempt_count) == (actions_pb2.EXECUTION_STATE_SUCCESS, 2)
            assert await caller.attempts(one.id) == ["refused", "success"]


async def test_a_command_that_can_not_watch_any_more_says_how_to_go_on(relay: Relay, tmp_path: Path) -> None:
    tenant = await relay.new_tenant()
    ours = await failed(relay.url, tenant.workspace_id, 10)
    async with ours.held_up(5), relay.connect(tenant.admin) as client:
        key = await client.auth.create_api_key("watcher", "admin")
        shell = Shell(tmp_path, str(relay.app.listen), key.secret)
        process = await shell.start("executions", "recover", "--since", "2026-01-01T00:00", "--yes")
        mine = "SELECT id FROM recoveries WHERE workspace_id = $1"
        ((id_,),) = await eventually(lambda: relay.sql(mine, tenant.workspace_id))
        await client.auth.revoke_api_key(key.id)
        _, err = await process.communicate()
    assert process.returncode
    assert f"It goes on: see 'relay executions recovery {id_}'" in err.decode()


async def test_what_can_not_be_recovered_is_refused(relay: Relay, recoverer: Recoverer) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    for range_ in ((START, START), (START + timedelta(seconds=1), START), (tomorrow,), (tomorrow, None)):
        with pytest.raises(InvalidRequest):
            await recoverer.recover(*range_)
    assert (await recoverer.recover(START, tomorrow, validate_only=True)).total_count == 0
    theirs = await failed(relay.url, relay.tenant.workspace_id, 1)
    for connection_id in (uuid4(), theirs.connection_id):
        with pytest.raises(NotFound):
            await recoverer.recover(START, None, connection_id)
    async with recovering(relay.app.listen, relay.tenant) as neighbour:
        other = await neighbour.recover()
        for look in (recoverer.get, recoverer.cancel):
            for id_ in (str(uuid4()), other.id):
                with pytest.raises(NotFound):
                    await look(id_)
        assert not (await neighbour.ended(other)).cancelled
