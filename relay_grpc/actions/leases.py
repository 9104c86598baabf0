"""Executions as their workers have them: leased, completed, taken over. One statement each, over many workspaces.

Connection first, as relay_worker. Whoever writes holds a lease, and is fenced by its token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc.actions.catalogue import Action
from relay_grpc.actions.execution import AttemptResult, Transition
from relay_grpc.actions.execution_store import ATTEMPT, EXECUTION
from relay_grpc.actions.lanes import Room
from relay_grpc.actions.store import halted_sql
from relay_grpc.audit.event import Event, as_json
from relay_grpc.audit.store import COLUMNS, EVENTS, appending

if TYPE_CHECKING:
    from relay_grpc.db import Connection

# What a worker needs of an execution e, and of its connection c: secrets are those that are valid, newest first, which
# is the one that has no end: ids are made by the clocks of several instances.
WORK = f"{EXECUTION}, e.workspace_id, e.parameters, e.traceparent, e.lease_token, e.attempts_before"
TARGET = """
    c.configuration, c.failures, c.open_until,
    (SELECT json_agg(json_build_object('id', s.id, 'kind', s.kind, 'encryption_key_id', s.encryption_key_id,
                                       'wrapped_key', encode(s.wrapped_key, 'hex'),
                                       'ciphertext', encode(s.ciphertext, 'hex'))
                     ORDER BY s.expires_at DESC NULLS FIRST, s.id DESC)
       FROM connection_secrets s
      WHERE s.connection_id = c.id AND (s.expires_at IS NULL OR s.expires_at > now())) AS secrets
"""

# The connections with work of the actions $1 that is due and that nothing holds back, found by one look into the index
# for each that has any work. next_attempt_at: of the earliest.
READY = f"""
    waiting AS (
      (SELECT connection_id, next_attempt_at FROM action_executions
        WHERE status = 'pending' AND action_type = ANY($1) ORDER BY connection_id, next_attempt_at LIMIT 1)
      UNION ALL
      SELECT n.connection_id, n.next_attempt_at
        FROM waiting w
       CROSS JOIN LATERAL (SELECT connection_id, next_attempt_at FROM action_executions
                            WHERE status = 'pending' AND action_type = ANY($1) AND connection_id > w.connection_id
                            ORDER BY connection_id, next_attempt_at LIMIT 1) n
    ), ready AS (
      SELECT c.id AS connection_id, c.workspace_id, c.open_until, waiting.next_attempt_at
        FROM waiting JOIN connections c ON c.id = waiting.connection_id
       WHERE waiting.next_attempt_at <= now() AND c.enabled AND (c.open_until IS NULL OR c.open_until <= now())
         AND NOT EXISTS (SELECT FROM halts h WHERE {halted_sql("c.workspace_id", "c.provider")})
    )
"""  # noqa: S608  # the names are ours


# The work that is due there, with its turn: next is always a workspace that would then run least. Connections without
# room ($3 to $7) are left out; and so many rows ($8) are of no more connections, the first ones.
_DUE = f"""
    {READY}, lanes AS (
      SELECT ready.*, of_workspace, room,
             of_workspace + row_number() OVER (PARTITION BY workspace_id ORDER BY next_attempt_at) AS turn
        FROM ready
        LEFT JOIN unnest($4::uuid[], $5::int[]) w(busy, running) ON w.busy = workspace_id
        LEFT JOIN unnest($6::uuid[], $7::int[]) l(busy, running) ON l.busy = connection_id
       CROSS JOIN LATERAL (
         SELECT coalesce(w.running, 0) AS of_workspace,
                least($3 - coalesce(l.running, 0), CASE WHEN open_until IS NOT NULL THEN 1 END) AS room) r
       WHERE room > 0
       ORDER BY turn, next_attempt_at LIMIT $8
    ), due AS (
      SELECT d.id, d.next_attempt_at, lanes.workspace_id, lanes.connection_id,
             of_workspace + row_number() OVER (PARTITION BY workspace_id ORDER BY d.next_attempt_at) AS turn
        FROM lanes
       CROSS JOIN LATERAL (SELECT id, next_attempt_at FROM action_executions e
                            WHERE e.connection_id = lanes.connection_id AND status = 'pending'
                              AND next_attempt_at <= now() AND action_type = ANY($1)
                            ORDER BY next_attempt_at LIMIT room) d
    )
"""  # noqa: S608  # the names are ours


async def find_due(connection: "Connection", actions: Sequence[Action], room: Room, limit: int) -> list[asyncpg.Record]:
    """What could be leased now, in turn: id, workspace_id and connection_id, of no more than there is room for.

    Workspaces take turns: next is always one that would then run least. Nothing is written or locked, least of all what
    is held back: by a halt, a connection that is disabled, whose breaker is open, or that has no room.
    """
    return await connection.fetch(
        f"""
        WITH RECURSIVE {_DUE}
        SELECT id, workspace_id, connection_id FROM due WHERE turn <= $2 ORDER BY turn, next_attempt_at LIMIT $8
        """,  # noqa: S608  # the names are ours
        [action.name for action in actions],
        room.per_workspace,
        room.per_connection,
        *room.as_arrays(),
        min(limit, room.in_all),
    )


async def claim(
    connection: "Connection", ids: Sequence[UUID], lease_token: UUID, lease: timedelta
) -> list[asyncpg.Record]:
    """Leases those of these executions that are still due, and counts the attempt. Returns rows to run.

    Of a connection whose breaker is half open, one attempt at a time is leased anywhere.
    """
    return await connection.fetch(
        f"""
        WITH locked AS (
          SELECT e.id, e.connection_id FROM action_executions e
           WHERE e.id = ANY($1::uuid[]) AND e.status = 'pending' AND e.next_attempt_at <= now()
             FOR UPDATE SKIP LOCKED
        ), probing AS (
          -- Whoever moves open_until has the probe; it is the next one's when this lease has run out.
          UPDATE connections c SET open_until = now() + $3::interval
           WHERE c.id IN (SELECT id FROM connections
                           WHERE id IN (SELECT connection_id FROM locked) AND open_until <= now()
                             FOR NO KEY UPDATE SKIP LOCKED)  -- whoever changes one must not hold up the others
          RETURNING c.id
        ), claimed AS (
          UPDATE action_executions e
             SET status = 'executing', attempt_count = e.attempt_count + 1, attempt_started_at = now(),
                 lease_token = $2, lease_until = now() + $3::interval, next_attempt_at = NULL
            FROM locked JOIN connections c ON c.id = locked.connection_id
           WHERE locked.id = e.id AND c.enabled AND (c.open_until IS NULL OR c.id IN (SELECT id FROM probing))
             AND NOT EXISTS (SELECT FROM halts h WHERE {halted_sql("c.workspace_id", "c.provider")})
          RETURNING {WORK}
        )
        SELECT e.*, {TARGET} FROM claimed e JOIN connections c ON c.id = e.connection_id
        """,  # noqa: S608  # the names are ours
        ids,
        lease_token,
        lease,
    )


@dataclass(frozen=True, slots=True)
class Completion:
    """An attempt's end to record, by whoever holds the lease."""

    execution_id: UUID
    lease_token: UUID
    result: AttemptResult
    transition: Transition
    event: Event

    def as_row(self) -> dict[str, str | int | float]:
        return {
            "execution_id": str(self.execution_id),
            "lease_token": str(self.lease_token),
            "event_id": str(self.event.id),
            "outcome": self.result.outcome,
            "status_code": self.result.status_code,
            "response_excerpt": self.result.response_excerpt,
            "error": self.result.error,
            "state": self.transition.state,
            "delay": self.transition.delay.total_seconds(),
        }


_EVENTS = f"""
    SELECT {", ".join(f"l.{name}" for name in COLUMNS)}
      FROM json_to_recordset($2::json) AS l{EVENTS} JOIN done e ON l.id = e.event_id
"""  # noqa: S608  # the names are ours


async def complete(connection: "Connection", completions: Sequence[Completion]) -> dict[UUID, asyncpg.Record]:
    """Records attempts and what follows from them: no further attempt of what was cancelled meanwhile.

    Returns the executions as they are now, by the completion's event id; a lost lease has no row.
    """
    rows = await connection.fetch(
        f"""
        WITH input AS (
          SELECT *, state = 'pending' AS goes_on FROM jsonb_to_recordset($1::jsonb) AS i(
            execution_id uuid, lease_token uuid, event_id uuid, outcome attempt_outcome, status_code int,
            response_excerpt text, error text, state execution_state, delay float8)
        ), done AS (
          UPDATE action_executions e
             SET status = CASE WHEN i.goes_on AND e.cancel_requested_at IS NOT NULL THEN 'cancelled' ELSE i.state END,
                 lease_token = NULL, lease_until = NULL,
                 next_attempt_at = CASE WHEN i.goes_on AND e.cancel_requested_at IS NULL
                                        THEN now() + i.delay * interval '1 second' END,
                 completed_at = CASE WHEN i.state IN ('success', 'failed')
                                       OR i.goes_on AND e.cancel_requested_at IS NOT NULL THEN now() END
            FROM input i
           WHERE e.id = i.execution_id AND e.status = 'executing' AND e.lease_token = i.lease_token
          RETURNING {EXECUTION}, e.workspace_id, e.attempt_started_at,
                    i.event_id, i.outcome, i.status_code, i.response_excerpt, i.error
        ), attempts AS (
          INSERT INTO execution_attempts AS a
            (execution_id, number, workspace_id, started_at, outcome, status_code, response_excerpt, error)
          SELECT id, attempt_count, workspace_id, attempt_started_at, outcome, status_code, response_excerpt, error
            FROM done
          RETURNING a.execution_id, {ATTEMPT}
        ), {appending(_EVENTS)}
        SELECT {EXECUTION}, e.event_id, {ATTEMPT} FROM done e JOIN attempts a ON a.execution_id = e.id
        """,  # noqa: S608  # the names are ours
        json.dumps([one.as_row() for one in completions]),
        as_json([one.event for one in completions]),
    )
    return {row["event_id"]: row for row in rows}


async def list_lapsed(connection: "Connection", limit: int) -> list[asyncpg.Record]:
    """Executions whose worker let its lease run out. Whoever completes them is fenced by the token they still have.

    What somebody holds is left for the next look: it must not hold up the others.
    """
    return await connection.fetch(
        f"""
        SELECT {WORK}, {TARGET} FROM action_executions e JOIN connections c ON c.id = e.connection_id
         WHERE e.status = 'executing' AND e.lease_until <= now()
         ORDER BY e.lease_until LIMIT $1
           FOR UPDATE OF e SKIP LOCKED
        """,  # noqa: S608  # the names are ours
        limit,
    )


async def get(connection: "Connection", id_: UUID, lease_left: timedelta) -> asyncpg.Record | None:
    """The execution. in_time: it has a lease that goes on for longer than lease_left."""
    return await connection.fetchrow(
        f"""
        SELECT {WORK}, {TARGET}, coalesce(e.lease_until > now() + $2::interval, false) AS in_time
          FROM action_executions e JOIN connections c ON c.id = e.connection_id
         WHERE e.id = $1
        """,  # noqa: S608  # the names are ours
        id_,
        lease_left,
    )


async def revisions(connection: "Connection", ids: Sequence[UUID]) -> dict[UUID, int]:
    """How often each of these executions has changed; one that is not there has none."""
    rows = await connection.fetch("SELECT id, revision FROM action_executions WHERE id = ANY($1::uuid[])", ids)
    return {row["id"]: row["revision"] for row in rows}
