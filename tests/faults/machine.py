"""What callers, receivers, administrators, time and crashes may do to executions: a Hypothesis state machine.

It runs over a running server, a real database, and receivers whose answers the machine chooses.
"""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, multiple, rule
from relay.v1 import actions_pb2, auth_pb2, connections_pb2

from relay_grpc import halts
from relay_grpc.actions.execution import ENDED, State
from tests.actions.caller import eventually
from tests.faults.example import ENABLED, GOING_ON, Example, Previewed, Target
from tests.rpc.wire import Answer

ANSWERS = ("200", "200", "500", "410", "429", "hang", "reset")

numbers = st.integers(0, 1)
actions = st.sampled_from(("webhook.send", "webhook.send", "webhook.send_once"))
payloads = st.integers(0, 2)


class Executions(Example):
    """How many values bundles hold must not depend on what happens, or Hypothesis could not tell one example from
    another: what was refused is there too, as None.
    """

    previews = Bundle("previews")
    executions = Bundle("executions")

    # What callers do

    @rule(target=previews, number=numbers, action=actions, n=payloads)
    def preview(self, number: int, action: str, n: int) -> Previewed | None:
        previewed: Previewed | None = self.run(self._preview(number, action, n))
        return previewed

    @rule(target=executions, number=numbers, action=actions, count=st.integers(1, 4))
    def execute_by_two_at_once(self, number: int, action: str, count: int) -> MultipleResults[str | None]:
        return multiple(*(self.run(self._execute_twice(number, action, n)) for n in range(count)))

    async def _execute_twice(self, number: int, action: str, n: int) -> str | None:
        previewed = await self._preview(number, action, n)
        one, other = await asyncio.gather(*(self._execute(previewed, "", alone=False) for _ in range(2)))
        assert one == other
        return one

    async def _preview(self, number: int, action: str, n: int) -> Previewed | None:
        target = self.targets[number]
        request = actions_pb2.PreviewRequest(
            action=action, connection_id=target.id, parameters={"payload": {"n": n, "target": number}}
        )
        disabled_before = not await self._enabled(target)
        answer = await self.call("ActionsService.Preview", request)
        if answer.code == "OK":
            assert not self.halted
            assert not disabled_before
            return Previewed(answer.reply.id, answer.reply.digest, self.caller, number, (action, n))
        assert answer.reason in ("ACTION_DISABLED", "CONNECTION_DISABLED"), answer
        assert self.halted if answer.reason == "ACTION_DISABLED" else not await self._enabled(target), answer
        return None

    @rule(target=executions, previewed=previews, key=st.sampled_from(("", "", "", "one", "two")))
    def execute(self, previewed: Previewed | None, key: str) -> str | None:
        id_: str | None = self.run(self._execute(previewed, key))
        return id_

    @rule(target=executions, previewed=previews)
    def execute_while_the_database_is_lost(self, previewed: Previewed | None) -> str | None:
        id_: str | None = self.run(self._execute(previewed, "", lost=True))
        return id_

    async def _execute(
        self, previewed: Previewed | None, key: str, *, alone: bool = True, lost: bool = False
    ) -> str | None:
        """The id of the execution; None: it was refused, as it had to be.

        alone: nobody else executes the same now. lost: the database's connections are, while the call is under way: it
        is repeated where nobody knows how it ended.
        """
        if previewed is None:
            return None
        request = actions_pb2.ExecuteRequest(
            preview_id=previewed.id, digest=previewed.digest, idempotency_key=key, wait=timedelta()
        )
        before = await self._facts(previewed, key)
        calling = asyncio.create_task(self.call("ActionsService.Execute", request))
        if lost:
            await self._lose_the_database()
        answer = await calling
        if lost and answer.code in ("UNAVAILABLE", "ABORTED"):
            answer = await self.call("ActionsService.Execute", request)
        after = await self._facts(previewed, key)
        reason = "" if answer.code == "OK" else answer.reason
        assert reason in {self._refusal(previewed, before), self._refusal(previewed, after)}, (before, answer)
        if reason:
            return None
        id_ = str(answer.reply.id)
        assert before["execution_id"] in (None, UUID(id_)), "a key has one execution"
        if alone and not lost:
            assert answer.reply.replayed == (before["execution_id"] is not None)
        self.acknowledged.setdefault(id_, previewed)
        self.answers[id_] += 1
        if lost:
            self.cut_off.add(id_)
        return id_

    async def _facts(self, previewed: Previewed, key: str) -> asyncpg.Record:
        """What decides about an Execute, as the database has it."""
        return await self.world.postgres.fetchrow(
            """
            SELECT e.id AS execution_id, p.execution_id AS used_by, c.enabled, c.version = p.connection_version AS fits
              FROM previews p JOIN connections c ON c.id = p.connection_id
              LEFT JOIN action_executions e ON e.workspace_id = p.workspace_id AND e.idempotency_key = $2
             WHERE p.id = $1
            """,
            previewed.id,
            key or previewed.id,
        )

    def _refusal(self, previewed: Previewed, facts: asyncpg.Record) -> str:
        """The reason for which an Execute is refused; empty: it is not."""
        taken = facts["execution_id"] and self.acknowledged.get(str(facts["execution_id"]), previewed)
        if previewed.caller != self.caller:
            return "RESOURCE_NOT_FOUND"
        if taken:
            same = (taken.target, taken.request) == (previewed.target, previewed.request)
            return "" if same else "IDEMPOTENCY_KEY_REUSED"
        if facts["used_by"]:
            return "PREVIEW_USED"
        if not facts["enabled"]:
            return "CONNECTION_DISABLED"
        if self.halted:
            return "ACTION_DISABLED"
        return "" if facts["fits"] else "PREVIEW_DRIFTED"

    @rule(id_=executions)
    def cancel(self, id_: str | None) -> None:
        if id_ is None:
            return
        before, answer, after = self.run(self._ask("CancelExecution", actions_pb2.CancelExecutionRequest(id=id_)))
        if before["status"] in GOING_ON and after["status"] in (*GOING_ON, State.CANCELLED):
            assert answer.code == "OK", (before, answer)
        elif before["status"] not in GOING_ON:
            assert answer.reason == "EXECUTION_STATE", (before, answer)

    @rule(id_=executions)
    def resend(self, id_: str | None) -> None:
        if id_ is None:
            return
        before, answer, after = self.run(self._ask("ResendExecution", actions_pb2.ResendExecutionRequest(id=id_)))
        again = before["status"] in ENDED and (before["delivery"], before["status"]) != ("at_most_once", State.SUCCESS)
        refusals = {
            "ACTION_DISABLED": self.halted,
            "CONNECTION_DISABLED": not before["enabled"] or not after["enabled"],
            "EXECUTION_STATE": not again,
        }
        if answer.code == "OK":
            assert again or before["status"] is State.EXECUTING, "an attempt that ended meanwhile can be resent"
            assert not self.halted
            assert before["enabled"]
        else:
            assert refusals[answer.reason], (before, answer)

    @rule(id_=executions, state=st.sampled_from((State.SUCCESS, State.FAILED)))
    def reconcile(self, id_: str | None, state: State) -> None:
        if id_ is None:
            return
        number = actions_pb2.ExecutionState.Value(f"EXECUTION_STATE_{state.name}")
        request = actions_pb2.ReconcileExecutionRequest(id=id_, state=number, reason="it was looked at")
        before, answer, after = self.run(self._ask("ReconcileExecution", request, self.admin))
        if before["status"] is State.UNKNOWN:
            assert (answer.code, after["status"]) == ("OK", state), answer
        elif before["status"] is not State.EXECUTING:
            assert answer.reason == "EXECUTION_STATE", (before, answer)

    async def _ask(self, rpc: str, request: Any, key: str = "") -> tuple[Any, Answer, Any]:
        """The execution before, the answer, and the execution after."""
        before = await self._now(request.id)
        answer = await self.call(f"ActionsService.{rpc}", request, key)
        return before, answer, await self._now(request.id)

    async def _now(self, id_: str) -> dict[str, Any]:
        row = await self.world.postgres.fetchrow(
            """
            SELECT e.status, e.delivery, c.enabled
              FROM action_executions e JOIN connections c ON c.id = e.connection_id WHERE e.id = $1
            """,
            id_,
        )
        return dict(row) | {"status": State(row["status"])}

    # What administrators and operators do

    @rule(
        what=st.sampled_from(("rotate", "rotate", "change", "disable", "enable", "halt", "resume", "revoke")), n=numbers
    )
    def administer(self, what: str, n: int) -> None:
        """One rule, lest half of what happens is administration. n: of the connection."""
        self.run(self._administer(what, n))

    async def _administer(self, what: str, number: int) -> None:
        target, url = self.targets[number], self.world.relay.url
        match what:
            case "rotate":
                await self._rotate(target)
            case "change":
                timeout = {"timeout": timedelta(seconds=1 + self.world.seen["steps"] % 30)}
                await self._update(target, FieldMask(paths=["webhook.timeout"]), webhook=timeout)
            case "disable":
                await self._update(target, ENABLED, enabled=False, disabled_reason="for now")
                target.disabled = True
            case "enable":
                await self._update(target, ENABLED, enabled=True)
                target.disabled = False
            case "halt":
                await halts.halt(url, self.workspace, "", "an incident")
                self.halted = True
            case "resume":
                await halts.resume(url, self.workspace, "")
                self.halted = False
            case "revoke":
                await self._revoke()
        await self._hold()

    async def _rotate(self, target: Target) -> None:
        """Every other time at once, else with an overlap."""
        overlap = timedelta(hours=len(target.secrets) % 2)
        request = connections_pb2.RotateSecretRequest(id=target.id, overlap=overlap)
        answer = await self.call("ConnectionsService.RotateSecret", request, self.admin)
        if answer.code == "OK":
            target.secrets.append(answer.reply.signing_secret)
        else:
            assert answer.reason == "TOO_MANY_SIGNING_KEYS"

    async def _hold(self) -> None:
        """Notes what has been delivered, once nothing more may be."""
        for target in self.targets:
            if not (self.halted or target.disabled):
                target.held_at = None
            elif target.held_at is None:
                await self._quiet()
                target.held_at = len(target.receiver.requests)

    async def _revoke(self) -> None:
        revoked = self.key
        await self.call("AuthService.RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=self.caller), self.admin)
        new = auth_pb2.CreateApiKeyRequest(name="caller", role="developer")
        made = (await self.call("AuthService.CreateApiKey", new, self.admin)).reply
        self.caller, self.key = made.id, made.secret
        answer = await self.call("ActionsService.ListExecutions", actions_pb2.ListExecutionsRequest(), revoked)
        assert answer.code == "UNAUTHENTICATED"

    # What receivers, time and crashes do

    @rule(number=numbers, answer=st.sampled_from(ANSWERS))
    def the_receiver_answers(self, number: int, answer: str) -> None:
        self.run(self._answer(self.targets[number], answer))

    @rule(crash=st.booleans())
    def time_passes(self, crash: bool) -> None:
        if crash:
            self.run(self._lapse())
        self.run(self._pass())

    async def _lose_the_database(self) -> None:
        await self.world.postgres.execute(
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name LIKE 'relay relay_%'
            """
        )

        async def serves() -> bool:
            return (await self.call("ActionsService.ListExecutions", actions_pb2.ListExecutionsRequest())).code == "OK"

        await eventually(serves)
