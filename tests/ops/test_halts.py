"""The operator's kill switch: what it stops, for whom, what waits and goes on, and what the audit log says of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from relay.errors import FailedPrecondition
from relay.v1 import actions_pb2

from relay_grpc import halts
from relay_grpc.audit.event import SYSTEM_WORKSPACE
from tests.actions.caller import Caller, answer, answering, calling, eventually, held, received
from tests.harness import Receiver, Relay, receiving
from tests.ops.test_cli import Ended, Shell

REASON = "the price feed is wrong"
PENDING, SUCCESS = actions_pb2.EXECUTION_STATE_PENDING, actions_pb2.EXECUTION_STATE_SUCCESS


@dataclass
class Operator:
    """Runs the commands on the database of a Relay."""

    relay: Relay
    shell: Shell

    async def __call__(self, *arguments: str) -> Ended:
        return await self.shell(*arguments, DATABASE_URL=self.relay.url)

    async def events(self, workspace_id: object) -> list[tuple[str, ...]]:
        rows = await self.relay.sql(
            "SELECT action, provider, note, target, actor_type::text FROM audit_events"
            " WHERE workspace_id = $1 AND action ~ 'Halt|Resume' ORDER BY id",
            workspace_id,
        )
        return [tuple(row) for row in rows]


@pytest.fixture
async def operator(relay: Relay, tmp_path: Path) -> AsyncIterator[Operator]:
    yield Operator(relay, Shell(tmp_path, "127.0.0.1:1", ""))
    await relay.sql("DELETE FROM halts")


@dataclass
class Customer:
    """A workspace that sends to a receiver of its own. waiting: an execution that failed once, and is due again."""

    name: str
    caller: Caller
    receiver: Receiver
    waiting: actions_pb2.Execution
    unused: actions_pb2.Preview
    delivered: actions_pb2.Execution

    async def due(self) -> None:
        await self.caller.relay.sql(
            "UPDATE action_executions SET next_attempt_at = now() WHERE id = $1 AND status = 'pending'", self.waiting.id
        )

    async def state(self) -> int:
        return (await self.caller.get(self.waiting.id)).state

    async def refused(self) -> set[str]:
        """Why everything that would send something is refused."""
        texts = set()
        resend = actions_pb2.ResendExecutionRequest(id=self.delivered.id)
        for attempt in (
            self.caller.preview(),
            self.caller.execute(self.unused),
            answer(self.caller.stub.ResendExecution(resend, metadata=self.caller.metadata)),
        ):
            with pytest.raises(FailedPrecondition) as caught:
                await attempt
            assert caught.value.reason == "ACTION_DISABLED"
            texts.add(caught.value.message)
        return texts

    async def sends(self) -> bool:
        execution = await self.caller.execute(await self.caller.preview())
        return execution.state == SUCCESS


@asynccontextmanager
async def customer(relay: Relay) -> AsyncIterator[Customer]:
    async with AsyncExitStack() as stack:
        tenant = await relay.new_tenant()
        receiver = await stack.enter_async_context(receiving())
        caller = await stack.enter_async_context(calling(relay, receiver, key=tenant.admin))
        delivered = await caller.execute(await caller.preview())
        answering(receiver, 503)
        waiting = await caller.execute(await caller.preview())
        assert waiting.state == PENDING
        receiver.answer = None
        receiver.requests.clear()
        (row,) = await relay.sql("SELECT name FROM workspaces WHERE id = $1", tenant.workspace_id)
        yield Customer(row["name"], caller, receiver, waiting, await caller.preview(), delivered)


@pytest.fixture
async def one(relay: Relay) -> AsyncIterator[Customer]:
    async with customer(relay) as made:
        yield made


@pytest.fixture
async def other(relay: Relay) -> AsyncIterator[Customer]:
    async with customer(relay) as made:
        yield made


async def test_a_workspace_is_halted_and_nobody_else(operator: Operator, one: Customer, other: Customer) -> None:
    halted = await operator("halt", "--workspace", one.name, "--reason", REASON, "--json")
    assert (halted.code, halted.json[0]["workspace"], halted.json[0]["provider"]) == (0, one.name, "")
    assert all(REASON in text for text in await one.refused())
    await one.due()
    await other.due()
    await received(other.receiver, 1)
    assert await other.sends()
    await asyncio.sleep(0.3)  # six looks of the sweeper
    assert (one.receiver.requests, await one.state()) == ([], PENDING)

    assert (await operator("resume", "--workspace", one.name, "--json")).json == []
    await received(one.receiver, 1)
    assert (await one.caller.ended(one.waiting.id)).state == SUCCESS
    assert (await one.caller.execute(one.unused)).state == SUCCESS, "the refusal used up nothing"
    assert await one.sends()
    (row,) = await operator.relay.sql("SELECT id FROM workspaces WHERE name = $1", one.name)
    target = f"workspaces/{row['id']}"
    assert await operator.events(row["id"]) == [
        ("operator.Halt", "", REASON, target, "operator"),
        ("operator.Resume", "", "", target, "operator"),
    ]


async def test_everything_is_halted_and_attempts_under_way_end(
    operator: Operator, one: Customer, other: Customer
) -> None:
    release = held(one.receiver)
    under_way = await one.caller.execute(await one.caller.preview(), wait=0)
    await received(one.receiver, 1)
    assert (await operator("halt", "--reason", REASON)).code == 0
    release.set()
    assert (await one.caller.ended(under_way.id)).state == SUCCESS
    for each in (one, other):
        assert all(REASON in text for text in await each.refused())
        await each.due()
    await asyncio.sleep(0.3)  # six looks of the sweeper
    assert [await each.state() for each in (one, other)] == [PENDING, PENDING]
    assert (await operator("resume")).out == "Nothing is halted.\n"
    for each in (one, other):
        assert (await each.caller.ended(each.waiting.id)).id
        await eventually(each.sends)
    assert [event[:3] for event in await operator.events(SYSTEM_WORKSPACE)][-2:] == [
        ("operator.Halt", "", REASON),
        ("operator.Resume", "", ""),
    ]


async def test_a_provider_is_halted_in_a_workspace_and_in_all(
    operator: Operator, one: Customer, other: Customer
) -> None:
    await operator("halt", "--provider", "independent", "--workspace", one.name, "--reason", "its own")
    assert all("its own" in text for text in await one.refused())
    assert await other.sends()
    await operator("halt", "--provider", "independent", "--reason", "all of them")
    assert all("all of them" in text for text in await other.refused())
    left = await operator("resume", "--provider", "independent", "--json")
    assert [(halt["workspace"], halt["reason"]) for halt in left.json] == [(one.name, "its own")]
    assert await other.sends()
    assert await one.refused()
    await operator.relay.sql("UPDATE halts SET provider = 'another'")
    assert await one.sends(), "a halt of another provider is not one of this"


async def test_what_is_accepted_while_it_is_resumed_is_sent_once(operator: Operator, one: Customer) -> None:
    """Halted and resumed again and again, while somebody keeps executing: what was answered is sent, once."""
    accepted: list[str] = []
    reasons: set[str] = set()
    stop = asyncio.Event()

    async def work() -> None:
        while not stop.is_set():
            try:
                accepted.append((await one.caller.execute(await one.caller.preview(), wait=0)).id)
            except FailedPrecondition as error:
                reasons.add(error.reason)
                await asyncio.sleep(0.01)

    workers = [asyncio.create_task(work()) for _ in range(4)]
    for _ in range(20):
        await halts.halt(operator.relay.url, one.name, "", REASON)
        await asyncio.sleep(0.02)
        await halts.resume(operator.relay.url, one.name, "")
        await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*workers)
    assert reasons == {"ACTION_DISABLED"}

    async def all_sent() -> bool:
        return {(await one.caller.get(id_)).state for id_ in accepted} == {SUCCESS}

    await eventually(all_sent)
    assert sorted(id_ for id_ in one.receiver.ids() if id_ != one.waiting.id) == sorted(accepted)


async def test_to_halt_again_changes_the_reason_and_to_resume_again_nothing(operator: Operator, one: Customer) -> None:
    await halts.halt(operator.relay.url, one.name, "", "first")
    (halt,) = (await operator("halt", "--workspace", one.name, "--reason", "  second  ", "--json")).json
    assert halt["reason"] == "second"
    shown = await operator("halts")
    assert (one.name in shown.out, "second" in shown.out) == (True, True)
    again = [await operator("resume", "--workspace", one.name) for _ in range(2)]
    assert [(each.code, each.out, each.err) for each in again] == [
        (0, "Nothing is halted.\n", ""),
        (0, "Nothing is halted.\n", "Nothing was halted by exactly this.\n"),
    ]
    (row,) = await operator.relay.sql("SELECT id FROM workspaces WHERE name = $1", one.name)
    assert [event[0] for event in await operator.events(row["id"])] == [*2 * ("operator.Halt",), "operator.Resume"]


async def test_what_can_not_be_halted_is_refused_in_a_sentence(operator: Operator, one: Customer) -> None:
    attempts: dict[tuple[str, ...], tuple[int, str]] = {
        ("halt", "--workspace", "nobody", "--reason", REASON): (4, "no workspace is named 'nobody'"),
        ("halt", "--workspace", "system", "--reason", REASON): (4, "no workspace is named 'system'"),
        ("resume", "--workspace", "nobody"): (4, "no workspace is named 'nobody'"),
        ("halt", "--provider", "pigeons", "--reason", REASON): (4, "there is independent"),
        ("halt", "--reason", " "): (2, "1 to 256 characters"),
        ("halt", "--reason", "x" * 257): (2, "1 to 256 characters"),
    }
    ended = await asyncio.gather(*(operator(*arguments) for arguments in attempts))
    for (arguments, (code, text)), end in zip(attempts.items(), ended, strict=True):
        assert (end.code, text in end.err) == (code, True), (arguments, end)
    assert (await operator("halts", "--json")).json == []
    assert await one.sends()
