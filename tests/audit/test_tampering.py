"""Whoever holds a checkpoint and the public key notices what was done to the log, whoever did it."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from relay.errors import RelayError
from relay.proofs import (
    ProofError,
    VerifierKey,
    canonical,
    exports,
    open_checkpoint,
    verify_consistency,
    verify_event,
    verify_export,
)
from relay.proofs.leaves import parse

from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import Event, Outcome
from relay_grpc.audit.sequencer import Sequencer
from relay_grpc.audit.tree_store import SEQUENCER_LOCK
from relay_grpc.telemetry import Metrics
from tests.audit import tampering
from tests.audit.attack import Attack
from tests.audit.log import log_events
from tests.audit.tampering import KINDS
from tests.harness import Relay, Tenant

TABLES = ("audit_logs", "audit_values", "audit_leaves", "audit_tiles", "audit_checkpoints", "audit_pending")
Kind = Callable[[Attack], Any]


@dataclass
class Auditor:
    """Holds a checkpoint of a workspace's log, taken from the server, and its public key. He asks, and computes."""

    client: Any
    keys: list[VerifierKey]
    held: str

    async def alarm(self) -> str:
        """What is wrong with the log; "" if nothing is."""
        try:
            lines = [line async for line in self._lines()]
            report = await asyncio.to_thread(verify_export, lines, self.keys, [self.held])
            if report.unexplained:
                return f"{report.unexplained} events lack values"
            await self._check_proofs(lines[:-1])
        except ProofError as error:
            return str(error)
        except RelayError as error:
            # A log that was there is not "not there yet", and sizes that were signed are not sizes that never were.
            if error.reason not in ("LOG_DAMAGED", "NOT_LOGGED_YET", "INVALID_REQUEST"):
                raise
            return f"{error.reason}: {error.message}"
        return ""

    async def _lines(self) -> AsyncIterator[bytes]:
        exported = b"".join([answer.chunk async for answer in self.client.audit.export_events()])
        for line in exported.splitlines(keepends=True):
            yield line

    async def _check_proofs(self, lines: list[bytes]) -> None:
        """What the server proves is what it says: of the log since the checkpoint, and of each event."""
        held = open_checkpoint(self.held, self.keys)
        proof = await self.client.audit.get_consistency_proof(held.size)
        newest = open_checkpoint(proof.checkpoint.note, self.keys)
        verify_consistency(held.size, newest.size, held.root, newest.root, list(proof.hashes))
        for index, line in enumerate(lines):
            event = parse(line)["event"]
            proof = await self.client.audit.get_inclusion_proof(event["id"], tree_size=newest.size)
            checkpoint = open_checkpoint(proof.checkpoint.note, self.keys)
            verify_event(canonical(event), index, list(proof.hashes), checkpoint)


class Bench:
    """Two workspaces whose logs are tampered with, and brought back to what they were."""

    def __init__(self, relay: Relay, tenants: list[Tenant], clients: list[Any], connection: Any) -> None:
        self._relay = relay
        self._tenants = tenants
        self._clients = clients
        self._connection = connection
        self._signer = Signer({key.id: key.key for key in relay.settings.audit_keys})
        self._keys = [VerifierKey.parse(key) for key in self._signer.verifier_keys]
        self._number = 0

    async def fill(self) -> None:
        """Events of several kinds, in several checkpoints; then all of it is remembered."""
        outcomes = itertools.cycle(Outcome)
        for _ in range(4):
            for tenant in self._tenants:
                events = [
                    Event(
                        tenant.workspace_id,
                        "ActionsService.Execute",
                        next(outcomes),
                        provider="independent",
                        target=f"executions/{number}",
                        actor_id=f"user-{number}",
                        peer="192.0.2.1",
                        duration=0.001 * number,
                    )
                    for number in range(3)
                ]
                await log_events(self._relay.url, events)
            await self._integrate()
        self._held = (await self._clients[0].audit.get_checkpoint()).note
        await self._connection.execute("CREATE SCHEMA saved")
        for table in TABLES:
            await self._connection.execute(f"CREATE TABLE saved.{table} AS SELECT * FROM {table}")

    async def act(self) -> None:
        """Something that is logged."""
        self._number += 1
        await self._clients[0].auth.create_api_key(f"key {self._number}", "viewer")

    async def _integrate(self) -> None:
        await Sequencer(self._relay.app.db, self._signer, Metrics()).integrate()

    @asynccontextmanager
    async def _beyond_triggers(self) -> AsyncIterator[Any]:
        async with self._connection.transaction():
            await self._connection.execute("SELECT pg_advisory_xact_lock($1)", SEQUENCER_LOCK)
            await self._connection.execute("SET LOCAL session_replication_role = replica")
            yield self._connection

    async def alarm_after(self, kind: Kind | None, rng: random.Random) -> str:
        """What the auditor says of the victim's log after an attack of this kind, or after none."""
        goes_on = rng.random() < 0.5
        if kind is not None:
            async with self._beyond_triggers() as connection:
                victim, other = (tenant.workspace_id for tenant in self._tenants)
                goes_on = await kind(Attack(connection, rng, victim, other, self.act)) or goes_on
        if goes_on:
            await self.act()
            await self._integrate()
        try:
            return await Auditor(self._clients[0], self._keys, self._held).alarm()
        finally:
            await self._restore()

    async def _restore(self) -> None:
        async with self._beyond_triggers() as connection:
            for table in TABLES:
                await connection.execute(f"DELETE FROM {table}")
                await connection.execute(f"INSERT INTO {table} SELECT * FROM saved.{table}")


@pytest.fixture(scope="module")
async def bench(relay: Relay) -> AsyncIterator[Bench]:
    """The victim logs two checkpoints at least before what the auditor holds."""
    tenants = [await relay.new_tenant() for _ in range(2)]
    connection = await asyncpg.connect(relay.url)
    async with relay.connect(tenants[0].admin) as victim, relay.connect(tenants[1].admin) as other:
        made = Bench(relay, tenants, [victim, other], connection)
        await made.fill()
        yield made
    await connection.close()


@pytest.mark.long
async def test_every_tampering_is_noticed_and_nothing_else_is(
    bench: Bench, long: bool, figure: Callable[[str], None]
) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    count = 200 if long else 30
    kinds = [*KINDS, *rng.choices(KINDS, k=count - len(KINDS))]
    noticed, by_whom = 0, Counter[str]()
    for number, kind in enumerate(kinds):
        alarm = await bench.alarm_after(kind, random.Random(f"{seed} {number}"))
        assert alarm, f"{kind.__name__} was not noticed; seed {seed}, number {number}"
        noticed += 1
        by_whom["server" if alarm.split(":")[0].isupper() else "verifier"] += 1
    false = [alarm for _ in range(count) if (alarm := await bench.alarm_after(None, rng))]
    assert not false
    told = f"{noticed} of {count} tamperings noticed, by {dict(by_whom)}"
    figure(f"{told}; {len(false)} false alarms in {count}; seed {seed}")


class Agreeing(dict[int, bytes]):
    """Roots that are any root."""

    def __getitem__(self, size: int) -> bytes:
        return Agrees()

    def get(self, size: int, default: Any = None) -> bytes:
        return Agrees()


class Agrees(bytes):
    def __ne__(self, other: object) -> bool:
        return False


async def checking_none(*_: Any) -> None:
    """In place of Auditor._check_proofs, which would notice too."""


@pytest.mark.parametrize(
    ("check", "weakened", "missed"),
    [
        ("_roots", lambda *_: Agreeing(), tampering.edit_an_event),
        ("_roots", lambda *_: Agreeing(), tampering.reorder),
        ("_check_continued", lambda *_: None, tampering.cut_the_tail),
        ("_check_continued", lambda *_: None, tampering.forge_an_earlier_state),
        ("check_leaf", lambda *_: [], tampering.edit_a_value),
        ("check_leaf", lambda *_: [], tampering.erase_without_a_trace),
        (None, None, tampering.swap_or_edit_tiles),
    ],
)
async def test_a_verifier_that_leaves_a_check_out_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, check: str | None, weakened: Any, missed: Kind
) -> None:
    """Without the check, the tamperings that it is for go unnoticed: the test above would fail."""
    monkeypatch.setattr(Auditor, "_check_proofs", checking_none)
    if check:
        monkeypatch.setattr(exports, check, weakened)
    alarms = [await bench.alarm_after(missed, random.Random(seed)) for seed in range(8)]
    assert "" in alarms
