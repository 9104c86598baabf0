"""How receivers do: what attempts found is counted per connection, and the breaker's decisions are written down.

Beside the attempts, not in their transactions: a crash loses at most what was noted and not yet written, which the next
attempts find again.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.actions.breaker import Breaker, Decision, Tally, after, tally
from relay_grpc.actions.execution import AttemptResult, Outcome
from relay_grpc.audit import store
from relay_grpc.audit.event import Event
from relay_grpc.audit.event import Outcome as EventOutcome
from relay_grpc.db import Database
from relay_grpc.telemetry import Metrics

if TYPE_CHECKING:
    from relay_grpc.db import Connection

log = logging.getLogger(__name__)
MAX_BATCH = 256  # connections in a transaction
RETRY_SECONDS = 1.0
CLOSE_SECONDS = 5.0


class Health:
    """Notes results and writes what follows. One per process; construct it in the event loop, and close it.

    pause: seconds that a breaker waits for its first probe.
    """

    def __init__(self, db: Database, metrics: Metrics, *, pause: float) -> None:
        self._db = db
        self._metrics = metrics
        self._pause = timedelta(seconds=pause)
        # By connection and the configuration that the attempts went by: one entry each, however many results there are.
        self._noted: dict[tuple[UUID, str], Tally] = {}
        self._failing: set[UUID] = set()  # connections of which a failure was noted here since a success was
        self._arrived = asyncio.Event()
        self._closing = False
        self._writer = asyncio.create_task(self._run())

    def note(self, row: asyncpg.Record, result: AttemptResult) -> None:
        """Counts the result of an attempt; writes nothing for a connection that is well and stays so.

        row: the execution as it was leased, with its connection's configuration, failures and open_until.
        """
        seen = tally(result, probe=row["open_until"] is not None)
        if seen is None:
            return
        id_ = row["connection_id"]
        if result.outcome is not Outcome.SUCCESS:
            self._failing.add(id_)
        elif row["failures"] or row["open_until"] or id_ in self._failing:
            self._failing.discard(id_)
        else:
            return
        key = (id_, row["configuration"])
        self._noted[key] = self._noted.get(key, Tally()).then(seen)
        self._arrived.set()

    async def close(self) -> None:
        """Writes what is noted, for at most CLOSE_SECONDS."""
        self._closing = True
        self._arrived.set()
        await asyncio.wait([self._writer], timeout=CLOSE_SECONDS)
        self._writer.cancel()

    async def _run(self) -> None:
        while self._noted or not self._closing:
            await self._arrived.wait()
            try:
                while self._noted:
                    await self._write()
            except errors.RelayError:
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                log.exception("the health of %d connections could not be written", len(self._noted))
                self._noted.clear()  # or they would stand in the way of all that follow
            else:
                self._arrived.clear()

    async def _write(self) -> None:
        """Writes what is noted of up to MAX_BATCH connections, or raises and keeps it noted."""
        noted = {key: self._noted.pop(key) for key in list(islice(self._noted, MAX_BATCH))}
        try:
            async with self._db.worker() as connection, connection.transaction():
                decided = await self._decide(connection, noted)
        except BaseException:
            for key, earlier in noted.items():
                self._noted[key] = earlier.then(self._noted.get(key, Tally()))
            raise
        for row, decision in decided:
            if decision.disabled_reason:
                self._failing.discard(row["id"])
            if (row["open_until"] is None) != (decision.breaker.open_until is None):
                self._metrics.breaker_transitions.labels("open" if decision.breaker.open_until else "closed").inc()
            for action, reason in decision.events:
                self._metrics.audit_events.labels(_status(action)).inc()
                if action == "connection.disabled":
                    self._metrics.connections_disabled.labels(reason).inc()
                    log.warning("connection %s is disabled: %s", row["id"], decision.disabled_reason)

    async def _decide(
        self, connection: "Connection", noted: Mapping[tuple[UUID, str], Tally]
    ) -> Sequence[tuple[asyncpg.Record, Decision]]:
        """What was attempted by another configuration than that of now says nothing of the connection."""
        decided = []
        for row in await _lock(connection, {id_ for id_, _ in noted}):
            seen = noted.get((row["id"], row["configuration"]))
            if seen is not None:
                breaker = Breaker(row["failures"], row["failing_since"], row["probes"], row["open_until"])
                decision = after(breaker, seen, pause=self._pause, now=row["now"])
                if decision.breaker != breaker or decision.disabled_reason:
                    decided.append((row, decision))
        await _update(connection, decided)
        events = [
            Event(
                workspace_id=row["workspace_id"],
                action=action,
                status=_status(action),
                reason=reason,
                target=f"connections/{row['id']}",
                provider=row["provider"],
            )
            for row, decision in decided
            for action, reason in decision.events
        ]
        if events:
            await store.insert(connection, events)
        return decided


def _status(action: str) -> EventOutcome:
    return EventOutcome.SUCCESS if action == "connection.recovered" else EventOutcome.FAILED


async def _lock(connection: "Connection", ids: set[UUID]) -> list[asyncpg.Record]:
    """Those that are enabled, in one order everywhere; executions may still be added to them meanwhile."""
    return await connection.fetch(
        """
        SELECT id, workspace_id, provider, configuration, failures, failing_since, probes, open_until, now() AS now
          FROM connections WHERE id = ANY($1::uuid[]) AND enabled
         ORDER BY id FOR NO KEY UPDATE
        """,
        ids,
    )


async def _update(connection: "Connection", decided: Sequence[tuple[asyncpg.Record, Decision]]) -> None:
    await connection.executemany(
        """
        UPDATE connections
           SET failures = $2, failing_since = $3, probes = $4, open_until = $5, disabled_reason = $6,
               enabled = $6 = '', updated_at = CASE WHEN $6 = '' THEN updated_at ELSE now() END
         WHERE id = $1
        """,
        [
            (
                row["id"],
                decision.breaker.failures,
                decision.breaker.failing_since,
                decision.breaker.probes,
                decision.breaker.open_until,
                decision.disabled_reason,
            )
            for row, decision in decided
        ],
    )
