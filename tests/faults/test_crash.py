"""kill -9 while actions are under way: nothing acknowledged is lost, and what comes twice is the same message."""

import asyncio
import json
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from relay import aio
from relay.errors import Contention, DeadlineExceeded, Unavailable
from relay.v1 import actions_pb2, audit_pb2

from relay_grpc import datafolder
from tests.actions.caller import eventually
from tests.faults.checker import Delivery, Verdict, judge
from tests.harness import Receiver

ROUNDS = 3
ACTIONS = 40  # a round
CLIENTS = 8  # at one time
SEED = 4711
RECEIVER_SECONDS = 0.03  # how long the receiver thinks: most kills fall between send and record
ROOT = Path(__file__).parents[2]
SERVES = re.compile(r"serves gRPC on (\S+)")
TOGETHER = asyncio.Semaphore(CLIENTS)


@asynccontextmanager
async def server(folder: Path, module: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    """A server process on the data folder, and a client of it."""
    environ = {
        "PATH": os.environ["PATH"],
        "RELAY_DATA_DIR": str(folder / "data"),
        "RELAY_LISTEN": "127.0.0.1:0",
        "RELAY_HTTP_LISTEN": "127.0.0.1:0",
        "RELAY_ATTEMPT_TIMEOUT": "0.7",
        "RELAY_LEASE": "2.1",
        "RELAY_SWEEP_INTERVAL": "0.1",
        "RELAY_SHUTDOWN_GRACE": "1",
        "RATE_LIMIT_EXEC_PER_MIN": "1000000",
        "RELAY_RATE_LIMIT_CALLS_PER_MIN": "1000000",
    }
    log = folder / "server.log"
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, "serve", stderr=output, cwd=ROOT, env=environ
        )
    try:
        served = await eventually(lambda: SERVES.search(log.read_text()) or process.returncode is not None)
        assert isinstance(served, re.Match), log.read_text()
        credentials = datafolder.read(folder / "data" / datafolder.CREDENTIALS)
        assert credentials
        async with aio.connect(served[1], api_key=credentials["RELAY_ADMIN_KEY"]) as client:
            yield process, client
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


@dataclass
class History:
    """What clients asked for and heard, over all rounds. interrupted: asked for, and a kill came before the answer."""

    receiver: Receiver
    attempted: list[str] = field(default_factory=list)
    acknowledged: dict[str, str] = field(default_factory=dict)
    interrupted: set[str] = field(default_factory=set)

    async def act(self, client: Any, connection_id: str, name: str, process: asyncio.subprocess.Process) -> None:
        """Previews and executes with the name as key, unless the server is gone: then it is for a later round."""
        async with TOGETHER:
            if process.returncode is not None:
                return
            try:
                preview = await client.actions.preview(
                    "webhook.send", {"payload": {"name": name}}, connection_id=connection_id, timeout=5
                )
                execution = await client.actions.execute(preview, idempotency_key=name, timeout=5)
            except (Unavailable, DeadlineExceeded, Contention):
                self.interrupted.add(name)
                return
            self.acknowledged[name] = execution.id

    def unacknowledged(self) -> list[str]:
        return [name for name in self.attempted if name not in self.acknowledged]

    def verdict(self) -> Verdict:
        received = [
            Delivery(json.loads(body)["name"], headers["webhook-id"], body) for headers, body in self.receiver.requests
        ]
        return judge(self.attempted, self.acknowledged, received)


async def crash(
    folder: Path, receiver: Receiver, module: str, kill_after: Sequence[int]
) -> tuple[History, list[Any], list[Any]]:
    """For each number: a server, a round of actions, and kill -9 after so many deliveries of the round. Then a server
    that is left to end everything. Returns the history, and the executions and audit events of the last server.
    """
    history, connection_id = History(receiver), ""

    async def slowly(_request: web.Request) -> web.Response:
        await asyncio.sleep(RECEIVER_SECONDS)
        return web.Response()

    receiver.answer = slowly
    for number, count in enumerate(kill_after):
        async with server(folder, module) as (process, client):
            connection_id = connection_id or (await client.connections.create_webhook("crash", receiver.url)).id
            history.attempted += [f"round-{number}-action-{n}" for n in range(ACTIONS)]
            before = len(receiver.requests)
            actions = asyncio.gather(
                *(history.act(client, connection_id, name, process) for name in history.unacknowledged())
            )
            await eventually(lambda: len(receiver.requests) >= before + count)  # noqa: B023 # awaited in this turn
            process.kill()
            await process.wait()
            await actions
    async with server(folder, module) as (process, client):
        while names := history.unacknowledged():
            await asyncio.gather(*(history.act(client, connection_id, name, process) for name in names))

        async def under_way() -> bool:
            states = (actions_pb2.EXECUTION_STATE_EXECUTING, actions_pb2.EXECUTION_STATE_PENDING)
            return not [one async for one in client.actions.list_executions(states=states)]

        await eventually(under_way)
        executions = [one async for one in client.actions.list_executions()]
        outcome = audit_pb2.EVENT_OUTCOME_SUCCESS
        events = [one async for one in client.audit.list_events(action="ActionsService.Execute", outcome=outcome)]
        return history, executions, events


async def test_nothing_acknowledged_is_lost_to_kill_9(tmp_path: Path, receiver: Receiver) -> None:
    moments = random.Random(SEED)
    kill_after = [moments.randrange(1, ACTIONS - CLIENTS) for _ in range(ROUNDS)]
    history, executions, events = await crash(tmp_path, receiver, "relay_grpc", kill_after)
    verdict = history.verdict()
    assert verdict.valid, verdict
    assert verdict.duplicated <= history.interrupted, "more came twice than a kill had interrupted"
    assert set(history.acknowledged) == set(history.attempted)
    assert {one.idempotency_key: one.id for one in executions} == history.acknowledged
    assert {one.state for one in executions} == {actions_pb2.EXECUTION_STATE_SUCCESS}
    assert {event.target for event in events} >= {f"executions/{one.id}" for one in executions}


async def test_a_server_without_an_outbox_is_found_out(tmp_path: Path, receiver: Receiver) -> None:
    history, _, _ = await crash(tmp_path, receiver, "tests.faults.without_outbox", [5])
    verdict = history.verdict()
    assert verdict.lost
    assert not verdict.valid
