"""What an event costs once it is written: the sequencer's CPU in this process, and that of its database."""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from uuid import UUID, uuid4

import psutil
from rich.table import Table

from relay_grpc.audit import store
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import ActorType, Event
from relay_grpc.audit.sequencer import Sequencer
from relay_grpc.db import Database
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.schema import migrate
from relay_grpc.telemetry import Metrics

EVENTS = 5_000
AT_ONCE = 500  # events of one insert
ROUNDS = 5
LOGS = (1, 100)


def event(workspace_id: UUID) -> Event:
    """One as an attempt leaves it."""
    return Event(
        workspace_id=workspace_id,
        action="delivery.attempt",
        target=f"executions/{uuid4()}",
        action_type="webhook.send",
        provider="webhook",
        actor_type=ActorType.API_KEY,
        actor_id=f"key:{uuid4()}",
        actor_name="bench",
        request_id=str(uuid4()),
        trace_id=uuid4().hex,
        idempotency_key_hash=uuid4().hex * 2,
        params_hash=uuid4().hex * 2,
        params_prefix='{"payload": {"number": 1}}',
        peer="127.0.0.1",
        duration=0.0123,
    )


async def integrate(db: Database, sequencer: Sequencer, postgres: psutil.Process, logs: list[UUID]) -> list[float]:
    """Events a second, and microseconds of CPU an event: of this process, of Postgres."""
    async with db.worker() as connection:
        for _ in range(EVENTS // AT_ONCE):
            await store.insert(connection, [event(logs[n % len(logs)]) for n in range(AT_ONCE)])
    started, cpu, of_postgres = time.perf_counter(), time.process_time(), cpu_of(postgres)
    await sequencer.integrate()
    spent = time.process_time() - cpu, cpu_of(postgres) - of_postgres
    return [EVENTS / (time.perf_counter() - started), *(one / EVENTS * 1e6 for one in spent)]


def cpu_of(postgres: psutil.Process) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in postgres.children(recursive=True) if one.name() == "postgres")


async def rounds(url: str) -> dict[int, list[list[float]]]:
    db, metrics = await Database.open(url), Metrics()
    sequencer = Sequencer(db, Signer({"bench": bytes(32)}), metrics)
    logs = {count: [uuid4() for _ in range(count)] for count in LOGS}
    taken: dict[int, list[list[float]]] = {count: [] for count in LOGS}
    for _ in range(ROUNDS):
        for count in LOGS:
            taken[count].append(await integrate(db, sequencer, psutil.Process(), logs[count]))
    await db.close()
    return taken


def measure() -> Table:
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder)) as postgres:
        migrate(postgres.url())
        taken = asyncio.run(rounds(postgres.url()))
    table = Table(title=f"events given their places, {ROUNDS} interleaved rounds of {EVENTS:,}, medians")
    for column in ("", "events/s", "CPU/event, us", "Postgres, us"):
        table.add_column(column, justify="right")
    for count, samples in taken.items():
        medians = (statistics.median(column) for column in zip(*samples, strict=True))
        table.add_row(f"{count} logs" if count > 1 else "one log", *(f"{one:,.0f}" for one in medians))
    return table
