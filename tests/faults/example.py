"""One example of the state machine: a workspace, its receivers, time, and what must hold after each step.

Time and crashes are made in the database: what is due later is due now, and leases run out under those who hold them.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import standardwebhooks
from aiohttp import web
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from relay.v1 import auth_pb2, connections_pb2

from relay_grpc import halts
from relay_grpc.actions.execution import State
from relay_grpc.bootstrap import bootstrap
from tests.actions.caller import eventually
from tests.faults.history import cancelled, illegal, left, of_workspace
from tests.harness import Receiver, Relay, receiving
from tests.rpc.wire import Answer, Wire

RETRIES = 2  # of the connections: three attempts of each send
GOING_ON = (State.PENDING, State.EXECUTING)
ENABLED = FieldMask(paths=["enabled"])


@dataclass
class World:
    """What all examples share. postgres: connections past every wall. seen: what examples saw, counted."""

    relay: Relay
    wire: Wire
    postgres: Any
    loop: asyncio.AbstractEventLoop
    seen: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Previewed:
    """A preview. caller: the id of the key that made it. target: its connection's number. request: what it is of."""

    id: str
    digest: str
    caller: str
    target: int
    request: tuple[str, int]


@dataclass
class Target:
    """A connection and its receiver. secrets: that have signed. checked: how many of the receiver's requests were.

    held_at: how many requests it had had when deliveries were held back; None: they are not.
    """

    id: str
    receiver: Receiver
    secrets: list[str]
    answer: str = "200"
    disabled: bool = False
    checked: int = 0
    held_at: int | None = None
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self, request: web.Request) -> web.Response:
        answer = self.answer
        if answer == "hang":
            await self.released.wait()
        if answer == "reset" and request.transport:
            request.transport.abort()
        return web.Response(status=int(answer) if answer.isdigit() else 200)


class Example(RuleBasedStateMachine):
    """A workspace of its own with two connections. world: set by the test that runs it."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.stack = AsyncExitStack()
        self.targets: list[Target] = []
        self.acknowledged: dict[str, Previewed] = {}  # by the execution's id
        self.answers: Counter[str] = Counter()  # of Execute, by the execution's id
        self.cut_off: set[str] = set()  # executions of which an answer may have been lost
        self.halted = False

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """In the loop where the server is; the machine itself runs in a thread."""
        return asyncio.run_coroutine_threadsafe(work, self.world.loop).result(60)

    async def call(self, name: str, request: Any, key: str = "") -> Answer:
        """key: the developer's where none is named."""
        return await self.world.wire.call(name, request, key or self.key)

    @initialize()
    def begin(self) -> None:
        self.run(self._begin())

    async def _begin(self) -> None:
        self.world.seen["examples"] += 1
        self.workspace = f"workspace {uuid4()}"
        made = await bootstrap(self.world.relay.url, self.world.relay.settings, workspace=self.workspace)
        self.workspace_id, self.admin, self.key = made.workspace_id, made.keys["admin"], made.keys["developer"]
        self.caller = (await self.call("AuthService.WhoAmI", auth_pb2.WhoAmIRequest())).reply.id
        for number in range(2):
            receiver = await self.stack.enter_async_context(receiving())
            webhook = connections_pb2.WebhookConfiguration(
                url=receiver.url, retry_policy={"delays": [timedelta(hours=1)] * RETRIES}
            )
            new = connections_pb2.CreateConnectionRequest(name=f"connection {number}", webhook=webhook)
            made_connection = (await self.call("ConnectionsService.CreateConnection", new, self.admin)).reply
            target = Target(made_connection.id, receiver, [made_connection.signing_secret])
            receiver.answer = target.take
            self.targets.append(target)

    async def _update(self, target: Target, mask: FieldMask, **fields: Any) -> None:
        request = connections_pb2.UpdateConnectionRequest(connection={"id": target.id, **fields}, update_mask=mask)
        answer = await self.call("ConnectionsService.UpdateConnection", request, self.admin)
        assert answer.code == "OK", answer

    async def _enabled(self, target: Target) -> bool:
        enabled: bool = await self.world.postgres.fetchval("SELECT enabled FROM connections WHERE id = $1", target.id)
        return enabled

    # Time and crashes

    async def _answer(self, target: Target, answer: str) -> None:
        target.answer = answer
        target.released.set()
        target.released = asyncio.Event()

    async def _lapse(self) -> None:
        """A worker stops: its leases run out, and what it still writes comes too late."""
        await self.world.postgres.execute(
            """
            UPDATE action_executions SET lease_until = now() - interval '1 second'
             WHERE workspace_id = $1 AND status = 'executing'
            """,
            self.workspace_id,
        )

    async def _pass(self) -> None:
        """What was due later is due now, and goes on where it may."""
        await self.world.postgres.execute(
            "UPDATE action_executions SET next_attempt_at = now() WHERE workspace_id = $1 AND status = 'pending'",
            self.workspace_id,
        )
        await self.world.postgres.execute(
            "UPDATE connections SET open_until = now() WHERE workspace_id = $1 AND open_until > now()",
            self.workspace_id,
        )
        await self._quiet()

    async def _quiet(self) -> None:
        """Waits until no attempt is under way, and none has begun for longer than the sweeper rests."""
        calm = 0

        async def still() -> bool:
            nonlocal calm
            under_way = await self.world.postgres.fetchval(
                "SELECT count(*) FROM action_executions WHERE workspace_id = $1 AND status = 'executing'",
                self.workspace_id,
            )
            calm = 0 if under_way else calm + 1
            return calm > 6  # of 10 ms each

        await eventually(still)

    # What must hold

    @invariant()
    def holds(self) -> None:
        if self.targets:
            self.run(self._check())

    async def _check(self) -> None:
        workspace = self.workspace_id
        self.world.seen["steps"] += 1
        receipts = Counter(id_ for target in self.targets for id_ in target.receiver.ids())
        async with (
            self.world.postgres.acquire() as postgres,
            postgres.transaction(isolation="repeatable_read", readonly=True),
        ):
            history = await of_workspace(postgres, workspace)
            attempts = await postgres.fetch(
                """
                SELECT execution_id, array_agg(number ORDER BY number) AS numbers FROM execution_attempts
                 WHERE workspace_id = $1 GROUP BY execution_id
                """,
                workspace,
            )
            events = await postgres.fetch(
                """
                SELECT target, action, count(*) FROM audit_events WHERE workspace_id = $1 AND target LIKE 'executions/%'
                   AND (action = 'delivery.attempt' OR status = 'success') GROUP BY target, action
                """,
                workspace,
            )
        numbers_of = {row["execution_id"]: row["numbers"] for row in attempts}
        logged = {(UUID(row["target"].partition("/")[2]), row["action"]): row["count"] for row in events}
        assert {UUID(id_) for id_ in self.acknowledged} <= history.keys(), "what was acknowledged is lost"
        for id_, steps in history.items():
            assert not list(illegal(steps, RETRIES + 1)), list(illegal(steps, RETRIES + 1))
            ended = left(steps, State.EXECUTING)
            assert numbers_of.get(id_, []) == list(range(1, ended + 1)), "an attempt that ended is not on record"
            assert logged.get((id_, "delivery.attempt"), 0) == ended
            confirmed = logged[id_, "ActionsService.Execute"]
            assert confirmed == self.answers[str(id_)] or str(id_) in self.cut_off
            assert logged.get((id_, "ActionsService.ResendExecution"), 0) == steps[-1].resends
            assert logged.get((id_, "ActionsService.ReconcileExecution"), 0) == left(steps, State.UNKNOWN)
            assert logged.get((id_, "ActionsService.CancelExecution"), 0) >= cancelled(steps)
            assert receipts[str(id_)] <= steps[-1].attempts, "an attempt was sent twice"
        assert {UUID(id_) for id_ in receipts} <= history.keys(), "something was sent that nobody ordered"
        await self._check_receipts()

    async def _check_receipts(self) -> None:
        """Each is what was previewed, signed by a secret of its connection; none came while deliveries were held."""
        for number, target in enumerate(self.targets):
            requests = target.receiver.requests
            assert target.held_at in (None, len(requests)), "something was sent while deliveries were held back"
            for headers, body in requests[target.checked :]:
                sent = await self.world.postgres.fetchrow(
                    "SELECT connection_id, parameters FROM action_executions WHERE id = $1", headers["webhook-id"]
                )
                assert str(sent["connection_id"]) == target.id
                assert f'{{"payload":{body.decode()}}}' == sent["parameters"]
                assert f'"target":{number}' in sent["parameters"]
                assert any(_verifies(secret, headers, body) for secret in target.secrets)
            target.checked = len(requests)

    def teardown(self) -> None:
        try:
            if len(self.targets) == 2:
                self.run(self._finish())
        finally:
            self.run(self._end())

    async def _finish(self) -> None:
        """Everything that was acknowledged comes to an end once its receiver is well."""
        self.halted = False
        await halts.resume(self.world.relay.url, self.workspace, "")
        for target in self.targets:
            await self._answer(target, "200")
            await self._update(target, ENABLED, enabled=True)
            target.disabled, target.held_at = False, None
        for _ in range(20):
            await self._pass()
            history = await of_workspace(self.world.postgres, self.workspace_id)
            if not any(steps[-1].status in GOING_ON for steps in history.values()):
                break
        await self._check()
        self.world.seen["executions"] += len(history)
        for id_, steps in history.items():
            assert steps[-1].status not in GOING_ON, f"{id_} goes on for ever"
            self.world.seen["attempts"] += steps[-1].attempts
            self.world.seen["changes"] += len(steps)
        self.world.seen["receipts"] += sum(len(target.receiver.requests) for target in self.targets)

    async def _end(self) -> None:
        for target in self.targets:
            target.released.set()
        await self.stack.aclose()


def _verifies(secret: str, headers: dict[str, str], body: bytes) -> bool:
    try:
        standardwebhooks.Webhook(secret).verify(body, headers)
    except standardwebhooks.WebhookVerificationError:
        return False
    return True
