"""Audit events as their readers see them. Connection first, in the caller's workspace.

Row level security keeps operators that are not leakproof, those of enums among them, from being index conditions; under
a LIMIT, or without statistics, the planner likes to scan. So each query here leaves it one index that gives its order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.audit.event import ERASABLE, Outcome
from relay_grpc.ids import first_uuid7, time_of

if TYPE_CHECKING:
    from relay_grpc.db import Connection

_LEAST, _GREATEST = UUID(int=0), UUID(int=2**128 - 1)
VALUES = ", ".join(f"v.{name}" for name in (*ERASABLE, "salts"))
SKEW = timedelta(hours=1)  # by which the clocks of two instances may differ, generously


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events to list. Empty or None: all. before: only those with lesser ids."""

    action: str = ""
    provider: str = ""
    status: Outcome | None = None
    actor_id: str = ""
    request_id: str = ""
    start: datetime | None = None
    end: datetime | None = None
    before: UUID | None = None


async def list_events(connection: "Connection", workspace_id: UUID, wanted: Wanted, limit: int) -> list[asyncpg.Record]:
    """Newest first.

    One filter leads: its index is walked, newest first, and what the others don't let through is passed over.
    Raises LogDamaged where an event is gone whose values are there: a shorter page would hide those before it.
    """
    beyond = min(wanted.before or _GREATEST, _first(wanted.end) if wanted.end else _GREATEST)
    lowest = _first(wanted.start) if wanted.start else _LEAST
    rare = wanted.status in (Outcome.DENIED, Outcome.FAILED)
    texts = {name: value for name in _LEADING if (value := getattr(wanted, name))}
    leading = next((name for name in texts if name in ("request_id", "actor_id") or not rare), "")
    by_values = leading == "actor_id"
    await connection.execute(_PLANNING)
    rows = await connection.fetch(
        f"""
        WITH found AS MATERIALIZED ({_found(leading, list(texts), wanted.status)} LIMIT {limit:d}),
             page AS MATERIALIZED (SELECT * FROM {of_page("audit_logs", "id", "found") if by_values else "found"} l)
        SELECT l.*, {VALUES}, e.leaf_index
          FROM found f
          LEFT JOIN page l ON l.id = f.id
          LEFT JOIN {of_page("audit_values", "id")} v ON v.id = l.id
          LEFT JOIN {of_page("audit_leaves", "event_id")} e ON e.event_id = l.id
         ORDER BY f.id DESC
        """,  # noqa: S608  # the names are ours
        workspace_id,
        lowest,
        beyond,
        *texts.values(),
    )
    if any(row["id"] is None for row in rows):
        raise errors.LogDamaged("an event of this page is gone from the log; tell whoever operates this server")
    return rows


# Without statistics, it looks cheap to gather all there is and then to sort or to merge it.
_PLANNING = "; ".join(f"SET LOCAL enable_{way} = off" for way in ("sort", "mergejoin", "bitmapscan", "seqscan"))
_LEADING = ("request_id", "actor_id", "provider", "action")  # from the rarest


def _found(leading: str, texts: Sequence[str], status: Outcome | None) -> str:
    """The query of the events with ids from $2 up to $3 whose texts are $4 and so on, newest first.

    What leads is compared as a row with the id, and ordered by: only the index that begins with it gives that order.
    What is found by its values is only named: the events themselves are read at once then.
    """
    places = {name: f"${n}" for n, name in enumerate(texts, 4)}
    value, actor = places.pop(leading, ""), places.pop("actor_id", "")
    conditions = [f"(l.{name} = {place}) IS TRUE" for name, place in places.items()]  # no index's condition
    conditions += [f"l.status = '{status}'"] if status else []
    # OFFSET 0 keeps the planner from joining the tables as wholes.
    if leading == "actor_id":
        columns, source, table = "v.id", "audit_values v", "v"
        event = " AND ".join(["l.workspace_id = $1", "l.id = v.id", *conditions])
        conditions = [f"EXISTS (SELECT FROM audit_logs l WHERE {event} OFFSET 0)"] if conditions else []
    else:
        columns, source, table = "l.*", "audit_logs l", "l"
        by_actor = f"SELECT FROM audit_values WHERE workspace_id = $1 AND id = l.id AND actor_id = {actor} OFFSET 0"
        conditions += [f"EXISTS ({by_actor})"] if actor else []
    conditions += [f"{table}.workspace_id = $1", f"{table}.id >= $2", f"{table}.id < $3"]
    order = f"{table}.id DESC"
    if leading:
        key = f"({table}.{leading}, {table}.id)"
        conditions += [f"{key} >= ({value}, $2)", f"{key} < ({value}, $3)", f"{table}.{leading} <> ''"]
        order = f"{table}.{leading} DESC, {order}"
    return f"SELECT {columns} FROM {source} WHERE {' AND '.join(conditions)} ORDER BY {order}"  # noqa: S608


def of_page(table: str, key: str, page: str = "page") -> str:
    """The rows of a table about the events of a page, a CTE that has their ids.

    By their range too, which tells the months to look into, and by all ids at once: of neighbours in the index, only
    the first is searched for (from PostgreSQL 17 on).
    """
    return f"""(
        SELECT * FROM {table}
         WHERE workspace_id = $1 AND {key} = ANY (ARRAY(SELECT id FROM {page}))
           AND {key} >= (SELECT id FROM {page} ORDER BY id LIMIT 1)
           AND {key} <= (SELECT id FROM {page} ORDER BY id DESC LIMIT 1)
    )"""  # noqa: S608  # the names are ours


def _first(moment: datetime) -> UUID:
    """The least id whose time is not before the moment: those of ids are whole milliseconds."""
    first = first_uuid7(moment)
    return UUID(int=first.int + (1 << 80)) if moment.microsecond % 1000 else first


async def get(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record | None:
    return await connection.fetchrow(
        "SELECT * FROM audit_events WHERE workspace_id = $1 AND id = $2", workspace_id, id_
    )


async def about(
    connection: "Connection", workspace_id: UUID, targets: Sequence[str], since: UUID, limit: int
) -> list[asyncpg.Record]:
    """Events (id, action, leaf_index) with these targets, oldest first. since: an id that is older than they are."""
    return await connection.fetch(
        """
        WITH page AS MATERIALIZED (
          SELECT v.id FROM unnest($2::text[]) t(target)
           CROSS JOIN LATERAL (SELECT id FROM audit_values
                                WHERE workspace_id = $1 AND target = t.target AND target <> '' AND id >= $3
                                ORDER BY target, id LIMIT $4) v
           ORDER BY v.id LIMIT $4
        )
        SELECT p.id, l.action, e.leaf_index
          FROM page p
         CROSS JOIN LATERAL (SELECT action FROM audit_logs WHERE workspace_id = $1 AND id = p.id OFFSET 0) l
          LEFT JOIN LATERAL (SELECT leaf_index FROM audit_leaves
                              WHERE workspace_id = $1 AND event_id = p.id OFFSET 0) e ON true
         ORDER BY p.id
        """,
        workspace_id,
        targets,
        first_uuid7(time_of(since) - SKEW),
        limit,
    )
