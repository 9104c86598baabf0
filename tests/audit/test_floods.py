"""Refusals that anybody can cause in any number: few rows, no harm to anybody else, and none forgotten at a stop."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import grpc
import psutil
import pytest
from relay.v1 import auth_pb2

from relay_grpc import errors
from relay_grpc.audit import recorder as recording
from relay_grpc.audit.event import SYSTEM_WORKSPACE, ActorType, Event, Outcome
from relay_grpc.audit.recorder import Recorder
from relay_grpc.auth import keys
from relay_grpc.bootstrap import bootstrap
from relay_grpc.telemetry import Metrics
from tests.harness import Databases, Relay, settings_for
from tests.processes import Server, started
from tests.rpc.wire import Wire, wired

WHO = "AuthService.WhoAmI"
AT_ONCE = 20  # bad callers
WARMING = 8  # bad keys before memory is looked at: hashing one takes memory, once
PEERS = 500
SLOWER = 20  # times: how much slower a good caller's slowest calls may get beside a flood, on two shared cores
FLOOR = 0.01  # seconds: what is faster is not compared
MEMORY = 32 * 2**20  # bytes that a flood may leave behind


@dataclass
class Door:
    """A server process and a connection to it with a good key. postgres: past every wall."""

    server: Server
    wire: Wire
    postgres: Any

    async def bad(self, number: int, peer: str, well_formed: bool = False) -> str:
        key = keys.generate(live=False).text if well_formed else f"guess {number}"
        answer = await self.wire.call(WHO, key=key, x_forwarded_for=peer)
        return answer.reason

    async def good(self, calls: int) -> list[float]:
        """How long each took, in seconds."""
        took = []
        for _ in range(calls):
            began = time.perf_counter()
            assert (await self.wire.call(WHO)).code == "OK"
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0.005)
        return took

    @property
    def memory(self) -> int:
        return psutil.Process(self.server.process.pid).memory_info().rss

    async def stop(self, number: signal.Signals) -> None:
        self.server.process.send_signal(number)
        await self.server.process.wait()

    async def counted(self) -> list[tuple[Any, ...]]:
        rows = await self.postgres.fetch(
            "SELECT workspace_id, reason, peer, count FROM audit_events WHERE action = $1 ORDER BY peer", WHO
        )
        return [tuple(row) for row in rows]


@asynccontextmanager
async def opened(databases: Databases, folder: Path) -> AsyncIterator[Door]:
    async with databases.new() as url:
        made = await bootstrap(url, settings_for(folder))
        postgres = await asyncpg.connect(url)
        async with (
            started(url, folder, RELAY_TRUSTED_PROXIES="127.0.0.0/8") as server,
            grpc.aio.insecure_channel(server.listen) as channel,
        ):
            yield Door(server, Wire(channel, made.keys["admin"]), postgres)
        await postgres.close()


def p99(took: Sequence[float]) -> float:
    return sorted(took)[len(took) * 99 // 100]


@pytest.mark.long
async def test_a_flood_of_bad_keys_is_few_rows_and_blocks_nobody(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    """Half from one peer, of the form of keys, so that it is throttled; half from many peers, which are no keys."""
    half = 2500 if long else 300
    async with opened(databases, tmp_path) as door:
        before = p99(await door.good(100))
        await asyncio.gather(*(door.bad(number, "192.0.2.2", well_formed=True) for number in range(WARMING)))
        memory = door.memory
        numbers = iter(range(2 * half))
        reasons: list[str] = []

        async def flood() -> None:
            for number in numbers:
                one = number % 2 == 0
                peer = "192.0.2.1" if one else f"198.18.{number % PEERS // 250}.{number % PEERS % 250}"
                reasons.append(await door.bad(number, peer, well_formed=one))

        flooding = asyncio.gather(*(flood() for _ in range(AT_ONCE)))
        during: list[float] = []
        while not flooding.done():
            during += await door.good(10)
        await flooding
        grown = door.memory - memory
        await door.stop(signal.SIGTERM)
        rows = await door.counted()
    assert len(reasons) == 2 * half
    assert set(reasons) == {"CREDENTIALS_INVALID", "AUTHENTICATION_THROTTLED"}
    assert sum(row[3] for row in rows) == 2 * half + WARMING
    assert {row[0] for row in rows} == {SYSTEM_WORKSPACE}
    minutes = 3 if long else 2  # at most: one may end meanwhile
    assert len(rows) <= minutes * (PEERS / 2 + 4)
    assert len([row for row in rows if row[2] == "192.0.2.1"]) <= 2 * minutes
    assert p99(during) <= SLOWER * max(before, FLOOR)
    assert grown <= MEMORY
    figure(
        f"{2 * half} bad keys: {len(rows)} rows; a good caller's p99 {before * 1000:.1f} ms before, "
        f"{p99(during) * 1000:.1f} ms meanwhile; {grown / 2**20:+.1f} MiB"
    )


@pytest.mark.parametrize(("number", "kept"), [(signal.SIGTERM, 7), (signal.SIGKILL, 0)], ids=["stopped", "killed"])
async def test_what_was_counted_is_written_at_a_stop_and_lost_by_a_kill(
    databases: Databases, tmp_path: Path, number: signal.Signals, kept: int
) -> None:
    async with opened(databases, tmp_path) as door:
        while time.time() % 60 > 50:
            await asyncio.sleep(1)  # so that no minute ends meanwhile
        for guess in range(7):
            assert await door.bad(guess, "192.0.2.1") == "CREDENTIALS_INVALID"
        await door.stop(number)
        rows = await door.counted()
    assert rows == ([(SYSTEM_WORKSPACE, "CREDENTIALS_INVALID", "192.0.2.1", 7)] if kept else [])


async def test_a_key_beyond_its_limit_is_one_row_in_its_own_workspace(relay: Relay) -> None:
    async with wired(relay) as wire:
        limited = auth_pb2.CreateApiKeyRequest(name="limited", role="viewer", limits={"calls_per_minute": 5})
        key = (await wire.call("AuthService.CreateApiKey", limited)).reply
        answers = await asyncio.gather(*(wire.call(WHO, key=key.secret) for _ in range(90)))
    refused = sum(answer.code == "RESOURCE_EXHAUSTED" for answer in answers)
    await relay.app.recorder.flush(everything=True)
    rows = await relay.sql("SELECT * FROM audit_events WHERE actor_id = $1 AND reason = 'RATE_LIMITED'", key.id)
    assert refused >= 80
    assert len(rows) <= 2  # or the minute ended
    assert sum(row["count"] for row in rows) == refused
    assert {row["workspace_id"] for row in rows} == {relay.tenant.workspace_id}


def refusal(workspace_id: UUID, action: str, actor_id: str = "issuer#user") -> Event:
    return Event(workspace_id, action, Outcome.DENIED, "RATE_LIMITED", actor_type=ActorType.USER, actor_id=actor_id)


async def counts(relay: Relay, action: str) -> dict[Any, int]:
    rows = await relay.sql("SELECT workspace_id, actor_id, count FROM audit_events WHERE action = $1", action)
    assert len(rows) == len({(row["workspace_id"], row["actor_id"]) for row in rows})
    return {(row["workspace_id"], row["actor_id"]): row["count"] for row in rows}


async def test_a_user_of_two_workspaces_is_counted_in_each(relay: Relay) -> None:
    recorder, action = Recorder(relay.app.db, b"key", Metrics()), uuid4().hex
    own, other = relay.tenant.workspace_id, (await relay.new_tenant()).workspace_id
    for workspace_id in (own, other, other):
        recorder.count(refusal(workspace_id, action))
    await recorder.close()
    assert await counts(relay, action) == {(own, "issuer#user"): 1, (other, "issuer#user"): 2}


async def test_what_cant_be_written_is_kept_and_what_is_there_is_not_written_again(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a commit whose answer was lost: of a batch, some is in the log already."""
    monkeypatch.setattr(recording, "BATCH", 4)
    recorder, action, own = Recorder(relay.app.db, b"key", Metrics()), uuid4().hex, relay.tenant.workspace_id
    refusals = [refusal(own, action, f"user {number:02}") for number in range(10)]
    for event in refusals:
        recorder.count(event)
    connection = await asyncpg.connect(relay.url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE audit_values IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(errors.Contention):
                await recorder.flush(everything=True)
    finally:
        await connection.close()
    await recorder.write(refusals[5])
    await recorder.flush(everything=True)
    assert await counts(relay, action) == {(own, f"user {number:02}"): 1 for number in range(10)}
    await recorder.close()
