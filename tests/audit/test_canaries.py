"""Secrets on every kind of path, a crash among them, are in no event, export or tail; what is shown by design is."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToJson
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

from tests.actions.caller import eventually
from tests.harness import Databases
from tests.rpc.test_secrets import (
    Stage,
    database_error,
    rate_limit,
    refusal,
    rows_of_all_tables,
    staged,
    success,
    timeout,
)
from tests.rpc.wire import Wire

ENOUGH = 50  # secrets
FORMATS = audit_pb2.ExportFormat.keys()[1:]
PLACES = ("audit log", "audit tables", "list", "get", "tail", *FORMATS)  # where an event is told
OWN = ("errors", "spans", "log")  # and what tells whoever operates Relay, or answers the caller itself

# What a caller or an operator gives to be seen by whoever may read the log, and why it is shown.
LABELS = {
    "the name of a key": "it is who acts: Actor.name",
    "a role's name": "it is what was done something to: Event.target",
    "a request id": "it is for callers to find their calls by, in the log of the server too",
    "the host of a URL": "it is where deliveries go; its path and the rest are not shown",
    "words on a reconciliation": "they are Event.note: why somebody says so",
}


async def crash(stage: Stage) -> None:
    """kill -9 in the middle: what was under way is in no log, and what is done again tells no more."""
    preview = await stage.preview("crash")
    execute = actions_pb2.ExecuteRequest(
        preview_id=preview.reply.id, idempotency_key=stage.plants.new("crash: idempotency key", kept=True)
    )
    for point in ("audit.appending", "attempt.sent"):
        async with stage.another(RELAY_FAILPOINT=f"{point}:1") as server:
            async with grpc.aio.insecure_channel(server.listen) as channel:
                other = replace(stage, wire=Wire(channel, stage.admin))
                if point == "audit.appending":
                    answer = await other.preview("crash")
                else:
                    answer = await other.call("crash", "ActionsService.Execute", execute)
            assert answer.code == "UNAVAILABLE"
            assert await asyncio.wait_for(server.process.wait(), 20) == -signal.SIGKILL
    again = await stage.call("crash", "ActionsService.Execute", execute)
    assert again.reply.replayed


async def labels(stage: Stage) -> None:
    """Everything of LABELS, which is looked for to be found."""

    def label(where: str, *places: str) -> str:
        assert where in LABELS
        return stage.plants.new(where, kept=True, shown=(*PLACES, *places))

    named = auth_pb2.CreateApiKeyRequest(name=label("the name of a key", *OWN), role="admin")
    key = (await stage.call("labels", "AuthService.CreateApiKey", named)).reply
    stage.plants.key(key.secret, "labels: a key")
    role = auth_pb2.CreateRoleRequest(name=label("a role's name", *OWN), parent="viewer", scopes=["actions:read"])
    await stage.call("labels", "AuthService.CreateRole", role, key.secret)
    url = f"http://{label('the host of a URL', *OWN)}.invalid/{stage.plants.new('labels: path', kept=True)}"
    webhook = connections_pb2.CreateConnectionRequest(name="n", webhook={"url": url})
    request_id = label("a request id", *OWN)
    await stage.call("labels", "ConnectionsService.CreateConnection", webhook, key.secret, x_request_id=request_id)
    connection_id = await stage.connect("labels", stage.receiver.url)
    preview = await stage.preview("labels", connection_id)
    execute = actions_pb2.ExecuteRequest(preview_id=preview.reply.id)
    execution_id = (await stage.call("labels", "ActionsService.Execute", execute)).reply.id
    async with stage.postgres.transaction():
        await stage.postgres.execute("SET LOCAL session_replication_role = replica")  # no way leads there
        await stage.postgres.execute(
            "UPDATE action_executions SET status = 'unknown', completed_at = NULL WHERE id = $1", execution_id
        )
    words = label("words on a reconciliation", *OWN)
    settle = actions_pb2.ReconcileExecutionRequest(
        id=execution_id, state=actions_pb2.EXECUTION_STATE_FAILED, reason=words
    )
    assert (await stage.call("labels", "ActionsService.ReconcileExecution", settle)).code == "OK"


async def read(stage: Stage) -> None:
    """All that the log tells whoever may read it."""
    events: list[Any] = []
    token = "first"
    while token:
        request = audit_pb2.ListEventsRequest(page_size=200, page_token="" if token == "first" else token)
        page = (await stage.wire.call("AuditService.ListEvents", request)).reply
        events, token = [*events, *page.events], page.next_page_token
    stage.told["list"] = "\n".join(map(MessageToJson, events))
    got = [await stage.wire.call("AuditService.GetEvent", audit_pb2.GetEventRequest(id=one.id)) for one in events]
    stage.told["get"] = "\n".join(MessageToJson(one.reply) for one in got)
    await eventually(lambda: _all_in_the_log(stage))
    for name in FORMATS:
        request = audit_pb2.ExportEventsRequest(format=name)
        answer = await stage.wire.call("AuditService.ExportEvents", request)
        assert answer.code == "OK", answer
        stage.told[name] = b"".join(reply.chunk for reply in answer.replies).decode()
    assert len(stage.told["EXPORT_FORMAT_JSONL"].splitlines()) > len(events)


async def _all_in_the_log(stage: Stage) -> bool:
    return not await stage.postgres.fetchval("SELECT EXISTS (SELECT FROM audit_pending)")


class Tail:
    """What TailEvents tells from now on."""

    def __init__(self, channel: Any, key: str) -> None:
        call = channel.unary_stream(
            "/relay.v1.AuditService/TailEvents",
            request_serializer=audit_pb2.TailEventsRequest.SerializeToString,
            response_deserializer=audit_pb2.TailEventsResponse.FromString,
        )
        self._call = call(audit_pb2.TailEventsRequest(), metadata=(("authorization", f"Bearer {key}"),))
        self.told: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for one in self._call:
            self.told.append(MessageToJson(one))

    async def stop(self) -> str:
        self._call.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        return "\n".join(self.told)


async def test_canaries_are_in_no_event_and_labels_are(
    databases: Databases, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    async with databases.new() as url, staged(url, tmp_path) as stage:
        tail = Tail(stage.wire._channel, stage.admin)
        await eventually(lambda: tail.told)
        for scene in (success, refusal, rate_limit, database_error, timeout, crash, labels):
            await scene(stage)
        await read(stage)
        await eventually(lambda: "ReconcileExecution" in "".join(tail.told))
        stage.told["tail"] = await tail.stop()
        tables = await rows_of_all_tables(stage.postgres)
        stage.told["audit tables"] = "\n".join(
            [
                str(dict(row))
                for table in ("audit_logs", "audit_values", "audit_leaves", "audit_checkpoints", "audit_tiles")
                for row in await stage.postgres.fetch(f"SELECT to_jsonb(t)::text AS row FROM {table} t")
            ]
        )
    assert {place for place, text in stage.told.items() if not text} == set()
    assert len(stage.plants.where) - len(LABELS) >= ENOUGH
    assert stage.plants.found(stage.told, tables) == []
    # The search sees: what is shown by design is found wherever it is shown.
    found = replace(stage.plants, shown={}).found(stage.told)
    for where, why in LABELS.items():
        places = {line.partition(":")[0] for line in found if f"({where})" in line}
        assert places >= set(PLACES), why
    figure(f"{len(stage.plants.where)} canaries, 0 found in {', '.join(stage.told)}, tables")
