"""Publishes the newest checkpoint of every log outside the database, where whoever can write to that can't reach it.

What was published before is the alarm: a log that doesn't continue it has lost its end, was written anew, or is of a
restored backup.
"""

import asyncio
import logging
import time
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
from relay.proofs import ProofError, verify_consistency

from relay_grpc import errors
from relay_grpc.audit import tree_store
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.checkpoint_places import Head, Place, UnpublishedError
from relay_grpc.audit.merkle import Tree, consistency, tiles_of
from relay_grpc.db import Database
from relay_grpc.telemetry import Metrics

if TYPE_CHECKING:
    from relay_grpc.db import Connection

log = logging.getLogger(__name__)
INTERVAL = 5.0  # seconds
TOGETHER = 8  # checkpoints at one time


class ContradictedError(Exception):
    """A log doesn't continue what was published of it; the text tells how."""


class Publisher:
    """One per process."""

    def __init__(self, db: Database, signer: Signer, place: Place, metrics: Metrics) -> None:
        self._db = db
        self._signer = signer
        self._place = place
        self._metrics = metrics
        self._published: dict[UUID, Head] = {}
        self._troubles: dict[UUID | None, Exception] = {}  # what keeps a log's newest checkpoint unpublished
        self._reading = asyncio.Lock()
        self._complete_at = time.monotonic()
        metrics.audit_unpublished.set_function(lambda: time.monotonic() - self._complete_at)
        metrics.audit_contradicted_logs.set_function(
            lambda: sum(isinstance(trouble, ContradictedError) for trouble in self._troubles.values())
        )

    async def publish(self) -> None:
        """Publishes what is new. Raises RelayError where the database does not answer."""
        begun_at = time.monotonic()
        try:
            published = await self._place.logs()
        except UnpublishedError as error:
            self._trouble(None, error)
            return
        self._troubles.pop(None, None)
        async with self._db.worker() as connection:
            newest = await tree_store.heads(connection)
        heads = {id_: (row["tree_size"], row["root_hash"]) for id_, row in newest.items()}
        for workspace_id in published - heads.keys():
            self._trouble(workspace_id, ContradictedError("it is empty, and was not"))
        # Logs in trouble come last, the one that was tried last at the end, so that they keep no other from its turn.
        new = [id_ for id_, head in heads.items() if self._published.get(id_) != head and id_ not in self._troubles]
        new += [id_ for id_ in self._troubles if id_ in heads]
        for first in range(0, len(new), TOGETHER):
            if not any(await asyncio.gather(*map(self._publish, new[first : first + TOGETHER]))):
                return  # the next ones would fail too
        if not self._troubles:
            self._complete_at = begun_at

    async def _publish(self, workspace_id: UUID) -> bool:
        """Whether there was a way to publish; whether this log may be is another matter."""
        try:
            held = await self._place.held(workspace_id)
            # After `held`, which must not get ahead of it. One connection is enough.
            async with self._reading, self._db.worker() as connection:
                newest = await _continuing(connection, workspace_id, held)
            head = newest["tree_size"], newest["root_hash"]
            if head != held:
                if not self._signer.signed(newest["note"], workspace_id, *head):
                    raise ContradictedError(
                        "none of RELAY_AUDIT_KEYS and RELAY_AUDIT_OLD_KEYS signed its newest checkpoint"
                    )
                await self._place.put(workspace_id, head, newest["note"])
        except ContradictedError as error:
            self._trouble(workspace_id, error)
        except UnpublishedError as error:
            self._trouble(workspace_id, error)
            return False
        except errors.RelayError as error:
            log.info("the publisher waits: %s", error)
            return False
        else:
            self._published[workspace_id] = head
            self._troubles.pop(workspace_id, None)
        return True

    def _trouble(self, workspace_id: UUID | None, error: Exception) -> None:
        """Said once, as long as it is the same. None: it is all of them."""
        if workspace_id:
            self._published.pop(workspace_id, None)
        if isinstance(error, UnpublishedError):
            self._metrics.audit_publish_failures.inc()
        if str(self._troubles.get(workspace_id)) != str(error):
            if isinstance(error, ContradictedError):
                log.error(
                    "the audit log of workspace %s does not continue the checkpoint that was published of it: %s; "
                    "it was tampered with, or a backup was restored: docs/audit.md tells what to do",
                    workspace_id,
                    error,
                )
            else:
                log.error("checkpoints of %s are not published: %s", workspace_id or "all workspaces", error)
        self._troubles.pop(workspace_id, None)
        self._troubles[workspace_id] = error


async def _continuing(connection: "Connection", workspace_id: UUID, held: Head | None) -> asyncpg.Record:
    """The newest checkpoint of a log, which continues what is published of it. Raises ContradictedError."""
    newest = (await tree_store.newest_checkpoints(connection, [workspace_id])).get(workspace_id)
    if newest is None:
        raise ContradictedError("it is empty, and was not")
    if held is None:
        return newest
    (first, first_root), second, root = held, newest["tree_size"], newest["root_hash"]
    if second < first:
        raise ContradictedError(f"it had {first} events, and has fewer")
    ranges = consistency(first, second)
    tiles = await tree_store.read_tiles(connection, {workspace_id: tiles_of(ranges)})
    tree = Tree(tiles[workspace_id])
    try:
        verify_consistency(first, second, first_root, root, [tree.hash(*range_) for range_ in ranges])
    except (LookupError, ProofError) as error:
        raise ContradictedError(f"its first {first} events can't be shown to be what they were") from error
    return newest
