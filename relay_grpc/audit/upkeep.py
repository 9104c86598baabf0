"""What every instance does for the audit log once events are written: their places, their partitions, checkpoints."""

import logging

import asyncpg

from relay_grpc import errors
from relay_grpc.audit import publisher, sequencer, store, tree_store
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.checkpoint_places import Place
from relay_grpc.audit.event import Event, Outcome
from relay_grpc.audit.publisher import Publisher
from relay_grpc.audit.sequencer import Sequencer
from relay_grpc.db import Database, reason
from relay_grpc.jobs import Job, Jobs
from relay_grpc.telemetry import Metrics

log = logging.getLogger(__name__)
PARTITIONS_SECONDS = 600.0  # each time costs a few lookups in the catalogue
KEYS_SECONDS = 60.0
BATCH = 1000  # events that are written at once


class Upkeep:
    """One per process. Start it, and stop it.

    place: where checkpoints are published; None: nowhere.
    """

    def __init__(self, db: Database, signer: Signer, place: Place | None, metrics: Metrics) -> None:
        self._db = db
        self._signer = signer
        self._metrics = metrics
        jobs: dict[str, Job] = {
            "the sequencer": (sequencer.INTERVAL, Sequencer(db, signer, metrics).integrate),
            "the making of partitions": (PARTITIONS_SECONDS, self.make_partitions),
            "the change of keys": (KEYS_SECONDS, self.change_keys),
        }
        if place is not None:
            jobs["the publisher"] = publisher.INTERVAL, Publisher(db, signer, place, metrics).publish
        else:
            log.warning(
                "RELAY_AUDIT_CHECKPOINTS is not set: nothing outside the database would show that the end of an audit "
                "log was cut off, or an old backup restored"
            )
        self._jobs = Jobs(jobs)

    def start(self) -> None:
        self._jobs.start()

    async def stop(self) -> None:
        """What waits for its place is left to other instances, or to the next start."""
        await self._jobs.stop()

    async def make_partitions(self) -> None:
        """Makes those of the coming months, and tells how many events have none. What fails is tried again next time.

        Where one is missing, DEFAULT takes its events.
        """
        try:
            async with self._db.worker() as connection:
                left = await connection.fetchval("SELECT relay_make_audit_partitions()")
        except (errors.RelayError, asyncpg.PostgresError) as error:
            self._metrics.audit_partition_failures.inc()
            why = error if isinstance(error, errors.RelayError) else reason(error)
            log.warning("the audit log's partitions of the coming months can't be made: %s", why)
        else:
            self._metrics.audit_default_events.set(left)

    async def change_keys(self) -> None:
        """Logs an event wherever a key has not signed yet, so that every log's newest checkpoint is signed by all.

        Otherwise the log of a workspace where nothing happens would keep the operator from taking an old key away.
        """
        async with self._db.worker() as connection, connection.transaction():
            await tree_store.hold_sequencers(connection)
            heads = await tree_store.heads(connection)
            behind = {id_ for id_, row in heads.items() if not self._signer.all_stand_on(row["note"])}
            behind -= await tree_store.are_pending(connection, behind)
            note = f"signed by {', '.join(self._signer.names)} from now on"
            while behind:
                some = [behind.pop() for _ in range(min(BATCH, len(behind)))]
                events = [Event(workspace_id=id_, action="audit.keys_changed", note=note) for id_ in some]
                await store.insert(connection, events)
                self._metrics.audit_events.labels(Outcome.SUCCESS).inc(len(events))
