"""Erasing values from the audit log that may be personal data, without taking anything from its proofs.

Only audit_values changes: a value becomes NULL and its salt zeros, so that nobody can try guesses against the
commitment that stays in audit_logs. Every batch is a transaction with its event, oldest events first: a run that breaks
off has recorded what it did, and is continued by the next one. Runs beside each other count an event once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc import failpoints
from relay_grpc.audit.event import ERASABLE, SALT_BYTES
from relay_grpc.owner import as_owner, find_workspace, record, vacuum

if TYPE_CHECKING:
    from relay_grpc.db import Connection

BATCH = 5000
MOST_COPIES = 100
COUNT_TIMEOUT = 300.0  # seconds: of somebody who made tens of millions of events
NO_SALT = bytes(SALT_BYTES)
NONE = UUID(int=0)  # before all ids


@dataclass(frozen=True, slots=True)
class Part:
    """Events of which the same is erased. reason: their erasure's event's. condition: on audit_values, of $2."""

    reason: str
    condition: str
    fields: Sequence[str]


# What somebody did says who it was, where they were, and their words. What they did it to is the workspace's.
BY_ACTOR = Part("ACTOR", "actor_id = ANY($2) AND actor_id <> ''", ("actor_id", "actor_name", "peer", "note"))
# What was done to somebody's role names them, in its parameters too, which a hash lets whoever has the key try out.
ABOUT_ACTOR = Part(
    "ABOUT_ACTOR",
    "target = ANY($2) AND target <> ''",
    ("target", "note", "idempotency_key_hash", "params_hash", "params_prefix"),
)
EVENTS = Part("EVENTS", f"id = ANY($2::uuid[]) AND salts <> '\\x{NO_SALT.hex() * len(ERASABLE)}'", ERASABLE)


@dataclass(frozen=True, slots=True)
class Request:
    """What to erase. actor: of a key or user, as events have it; or else events: their ids."""

    workspace: str
    actor: str = ""
    events: Sequence[UUID] = ()

    def parts(self) -> Iterator[tuple[Part, Sequence[object]]]:
        """Each with what its condition is about."""
        if self.actor:
            yield BY_ACTOR, [self.actor]
            yield ABOUT_ACTOR, [f"roleAssignments/{self.actor}"]
        if self.events:
            yield EVENTS, self.events


@dataclass(frozen=True, slots=True)
class Found:
    """counts: events by Part.reason. copies: whoever exported or followed the log since the oldest of them, newest
    first, at most MOST_COPIES: time, action and actor_id of their events.
    """

    counts: Mapping[str, int]
    copies: Sequence[asyncpg.Record]


async def look(url: str, request: Request) -> Found:
    """What would be erased. Raises UnknownWorkspace and DatabaseUnusable."""
    async with as_owner(url) as connection:
        workspace_id = await find_workspace(connection, request.workspace)
        counts, oldest = dict[str, int](), list[UUID]()
        for part, wanted in request.parts():
            if first := await _find(connection, workspace_id, part, wanted, limit=1):
                oldest += first
                counts[part.reason] = await _count(connection, workspace_id, part, wanted)
        copies = await _copies(connection, workspace_id, min(oldest)) if oldest else []
        return Found(counts, copies)


async def erase(url: str, request: Request, note: str, told: Callable[[int], None]) -> Mapping[str, int]:
    """Erases it, records it, and has Postgres make room of what it was. Returns events by Part.reason.

    note: why, in the operator's words. told: called with the number of events done after each batch. Raises
    UnknownWorkspace and DatabaseUnusable.
    """
    done = Counter[str]()
    for part, wanted in request.parts():
        last = NONE
        while True:
            async with as_owner(url) as connection:
                workspace_id = await find_workspace(connection, request.workspace)
                ids = await _find(connection, workspace_id, part, wanted, after=last)
                if not ids and last == NONE:
                    break
                count = await _erase(connection, workspace_id, part, wanted, ids)
                failpoints.reach("erasure.midway")
                if count:
                    target = f"events/{ids[0]}" if len(ids) == 1 else ""
                    await record(
                        connection,
                        workspace_id,
                        "operator.EraseValues",
                        target,
                        reason=part.reason,
                        note=note,
                        count=count,
                    )
            done[part.reason] += count
            # In the end once more from the first on: what was committed late, or moved to its month meanwhile.
            last = ids[-1] if ids else NONE
            told(done.total())
    await vacuum(url, "audit_values")  # whatever was found: an earlier run may have broken off before it
    return +done


async def _count(connection: "Connection", workspace_id: UUID, part: Part, wanted: Sequence[object]) -> int:
    count: int = await connection.fetchval(
        f"SELECT count(*) FROM audit_values WHERE workspace_id = $1 AND {part.condition}",  # noqa: S608  # ours
        workspace_id,
        wanted,
        timeout=COUNT_TIMEOUT,
    )
    return count


async def _find(
    connection: "Connection",
    workspace_id: UUID,
    part: Part,
    wanted: Sequence[object],
    *,
    after: UUID = NONE,
    limit: int | None = None,
) -> list[UUID]:
    """Their ids, oldest first. limit: BATCH, where there is none."""
    rows = await connection.fetch(
        f"""
        SELECT id FROM audit_values WHERE workspace_id = $1 AND {part.condition} AND id > $3
         ORDER BY id LIMIT $4
        """,  # noqa: S608  # the conditions are ours
        workspace_id,
        wanted,
        after,
        limit or BATCH,
    )
    return [row["id"] for row in rows]


async def _erase(
    connection: "Connection", workspace_id: UUID, part: Part, wanted: Sequence[object], ids: Sequence[UUID]
) -> int:
    """Returns how many of them it was that did it: another run may have been there first."""
    salts = "salts"
    for field in part.fields:
        salts = f"overlay({salts} PLACING $4 FROM {SALT_BYTES * ERASABLE.index(field) + 1})"
    done = await connection.execute(
        f"""
        UPDATE audit_values SET {", ".join(f"{field} = NULL" for field in part.fields)}, salts = {salts}
         WHERE workspace_id = $1 AND id = ANY($3) AND {part.condition}
        """,  # noqa: S608  # the names are ours
        workspace_id,
        wanted,
        ids,
        NO_SALT,
    )
    return int(done.removeprefix("UPDATE "))


async def _copies(connection: "Connection", workspace_id: UUID, since: UUID) -> list[asyncpg.Record]:
    return await connection.fetch(
        """
        SELECT created_at, action, actor_id FROM audit_events
         WHERE workspace_id = $1 AND action IN ('AuditService.ExportEvents', 'AuditService.TailEvents')
           AND status = 'success' AND id >= $2
         ORDER BY id DESC LIMIT $3
        """,
        workspace_id,
        since,
        MOST_COPIES,
    )
