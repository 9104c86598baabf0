"""Letting old months of the audit log go: whole partitions at once, while every proof of what is kept still verifies.

The tiles stay, 32 bytes an event, so the log is as long as it was and has the same root. Each workspace that loses
events has an event that says so, with the first leaf from which on it has them all; exports begin there, and carry it.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import asyncpg

from relay_grpc.audit import store
from relay_grpc.audit.event import ActorType, Event
from relay_grpc.audit.places import DROP, FIRST_KEPT
from relay_grpc.db import DatabaseUnusable
from relay_grpc.ids import first_uuid7
from relay_grpc.owner import as_owner

if TYPE_CHECKING:
    from relay_grpc.db import Connection

T = TypeVar("T")
KEPT_MONTHS = 3  # whole ones, besides the one that is not over
TABLES = ("audit_logs", "audit_values", "audit_leaves")  # in the order in which others come to their partitions
LOCK_TIMEOUT = "250ms"  # callers wait as long behind it, and they have a second
ATTEMPTS = 40
BATCH = 10_000


class Refused(Exception):
    """These months can't be dropped; the text tells why."""


class _Busy(Exception):
    """Somebody is in a table right now."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a workspace loses.

    events: from the first of its leaves that go to the last. first_kept: the leaf from which on it has all of them.
    """

    workspace_id: UUID
    workspace: str
    events: int
    first_kept: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """months: as YYYY-MM, oldest first. size: bytes on disk, indexes included."""

    months: Sequence[str]
    size: int
    losses: Sequence[Loss]


def newest_boundary(now: datetime) -> date:
    """The latest month before which events may be dropped."""
    months = now.year * 12 + now.month - 1 - KEPT_MONTHS
    return date(months // 12, months % 12 + 1, 1)


async def look(url: str, before: date) -> Dropped:
    """What would be dropped: the months before one. Raises Refused and DatabaseUnusable."""
    _check(before)
    await _patiently(url, _make_partitions)
    async with as_owner(url) as connection:
        return await _look(connection, before)


async def drop(url: str, before: date) -> Dropped:
    """Drops them and records it, in one transaction. Raises Refused and DatabaseUnusable.

    Servers go on meanwhile: where they are in the tables, it steps back and tries again.
    """
    _check(before)
    dropped = await _patiently(url, lambda connection: _drop(connection, before))
    await _forget_checkpoints(url)
    return dropped


def _check(before: date) -> None:
    newest = newest_boundary(datetime.now(UTC))
    if before > newest:
        raise Refused(f"{KEPT_MONTHS} whole months are always kept: {newest:%Y-%m} is the latest that it may be")


async def _patiently(url: str, step: Callable[["Connection"], Awaitable[T]]) -> T:
    """Does it in a transaction that waits LOCK_TIMEOUT for a lock, at most, and else begins anew a little later."""
    for _ in range(ATTEMPTS):
        try:
            async with as_owner(url) as connection:
                await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
                try:
                    return await step(connection)
                except asyncpg.LockNotAvailableError as error:
                    raise _Busy from error
        except _Busy:
            await asyncio.sleep(random.uniform(0.1, 0.5))  # noqa: S311  # not for secrets
    raise DatabaseUnusable("the audit log was in use at every try: try again when there is less to do")


async def _make_partitions(connection: "Connection") -> None:
    """So that what DEFAULT has of a month goes with it. Nobody else makes or drops any until the transaction ends."""
    await connection.execute("SELECT relay_make_audit_partitions()")


async def _drop(connection: "Connection", before: date) -> Dropped:
    await _make_partitions(connection)
    partitions = _partitions(await _months(connection, before))
    if not partitions:
        return Dropped([], 0, [])
    await connection.execute(f"LOCK TABLE {', '.join(partitions)} IN SHARE MODE")  # they stay as they are counted
    dropped = await _look(connection, before)
    await store.insert(
        connection,
        [
            Event(
                workspace_id=loss.workspace_id,
                action=DROP,
                reason=f"{FIRST_KEPT}{loss.first_kept}",
                note=f"months before {before:%Y-%m}",
                actor_type=ActorType.OPERATOR,
            )
            for loss in dropped.losses
        ],
    )
    await connection.execute(f"DROP TABLE {', '.join(partitions)}")
    return dropped


def _partitions(months: Sequence[str]) -> list[str]:
    return [f"{table}_{month.replace('-', '_')}" for table in TABLES for month in months]


async def _months(connection: "Connection", before: date) -> list[str]:
    """Those that have a partition, as YYYY-MM."""
    rows = await connection.fetch(
        """
        SELECT to_char(month, 'YYYY-MM') AS month
          FROM (SELECT to_date(substr(relname, 12), 'YYYY_MM') AS month
                  FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
                 WHERE inhparent = 'audit_logs'::regclass AND relname <> 'audit_logs_default') p
         WHERE month < $1 ORDER BY month
        """,
        before,
    )
    return [row["month"] for row in rows]


async def _look(connection: "Connection", before: date) -> Dropped:
    boundary = first_uuid7(datetime(before.year, before.month, 1, tzinfo=UTC))
    if await connection.fetchval("SELECT EXISTS (SELECT FROM audit_pending WHERE event_id < $1)", boundary):
        raise Refused("events of these months have no place in the log yet: a running server gives them one in seconds")
    if await connection.fetchval("SELECT EXISTS (SELECT FROM audit_logs_default WHERE id < $1)", boundary):
        raise Refused("events of these months came meanwhile: try again")
    months = await _months(connection, before)
    size: int = await connection.fetchval(
        "SELECT coalesce(sum(pg_total_relation_size(name::regclass)), 0)::bigint FROM unnest($1::text[]) name",
        _partitions(months),
    )
    return Dropped(months, size, await _losses(connection, boundary))


async def _losses(connection: "Connection", boundary: UUID) -> list[Loss]:
    """By index, whatever the statistics: a look per workspace and month at the ends of its leaves."""
    await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL jit = off")
    rows = await connection.fetch(
        """
        SELECT w.id, w.name, first.leaf_index AS first, last.leaf_index AS last,
               coalesce(before.first_kept, 0) AS first_kept
          FROM workspaces w
         CROSS JOIN LATERAL (SELECT leaf_index FROM audit_leaves WHERE workspace_id = w.id AND event_id < $1
                              ORDER BY leaf_index LIMIT 1) first
         CROSS JOIN LATERAL (SELECT leaf_index FROM audit_leaves WHERE workspace_id = w.id AND event_id < $1
                              ORDER BY leaf_index DESC LIMIT 1) last
          LEFT JOIN LATERAL (SELECT substr(reason, $3)::bigint AS first_kept FROM audit_logs
                              WHERE workspace_id = w.id AND action = $2 ORDER BY id DESC LIMIT 1) before ON true
         ORDER BY w.name
        """,
        boundary,
        DROP,
        len(FIRST_KEPT) + 1,
    )
    return [
        Loss(row["id"], row["name"], row["last"] - row["first"] + 1, max(row["last"] + 1, row["first_kept"]))
        for row in rows
    ]


async def _forget_checkpoints(url: str) -> None:
    """Deletes those of logs that ended before the first event that is kept, but for the newest of them.

    They say when what was dropped was logged. Logs of their sizes are proven by the tiles as before.
    """
    while True:
        async with as_owner(url) as connection:
            deleted: int = await connection.fetchval(
                """
                WITH kept AS MATERIALIZED (
                  SELECT w.id, (SELECT tree_size FROM audit_checkpoints
                                 WHERE workspace_id = w.id AND tree_size <= d.first_kept
                                 ORDER BY tree_size DESC LIMIT 1) AS tree_size
                    FROM workspaces w
                   CROSS JOIN LATERAL (SELECT substr(reason, $2)::bigint AS first_kept FROM audit_logs
                                        WHERE workspace_id = w.id AND action = $1 ORDER BY id DESC LIMIT 1) d
                ), old AS (
                  SELECT c.workspace_id, c.tree_size FROM kept JOIN audit_checkpoints c
                      ON c.workspace_id = kept.id AND c.tree_size < kept.tree_size
                   LIMIT $3
                ), deleted AS (
                  DELETE FROM audit_checkpoints c USING old
                   WHERE c.workspace_id = old.workspace_id AND c.tree_size = old.tree_size RETURNING 1
                )
                SELECT count(*) FROM deleted
                """,
                DROP,
                len(FIRST_KEPT) + 1,
                BATCH,
            )
        if deleted < BATCH:
            return
