"""Executions as their workers have them: ordered, leased, completed. One statement each, over many rows and workspaces.

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
from relay_grpc.actions.store import ATTEMPT, EXECUTION
from relay_grpc.audit.event import COLUMNS, Event, as_json
from relay_grpc.call import Call

if TYPE_CHECKING:
    from relay_grpc.db import Connection

# What a worker needs to make an attempt: the job, and the secrets that sign it, newest first.
_SECRETS = """
    (SELECT json_agg(json_build_object('id', s.id, 'encryption_key_id', s.encryption_key_id,
                                       'wrapped_key', encode(s.wrapped_key, 'hex'),
                                       'ciphertext', encode(s.ciphertext, 'hex')) ORDER BY s.id DESC)
       FROM connection_secrets s
      WHERE s.connection_id = c.id AND (s.expires_at IS NULL OR s.expires_at > now())) AS secrets
"""


@dataclass(frozen=True, slots=True)
class Order:
    """An Execute to carry out. event: its audit event, to be completed from the preview."""

    execution_id: UUID
    workspace_id: UUID
    caller: str
    preview_id: UUID
    digest: str
    idempotency_key: str
    lease_token: UUID
    event: Event
    call: Call


async def commit(
    connection: "Connection", orders: Sequence[Order], actions: Sequence[Action], lease: timedelta
) -> dict[UUID, asyncpg.Record]:
    """Uses up the previews, makes the executions, leased already, and logs them.

    actions: what may run. Returns the rows to run by execution id; an order without one met a preview that is not
    there, used, expired or drifted, or an idempotency key that is taken: `explain` tells which.
    """
    rows = await connection.fetch(
        f"""
        WITH input AS (
          SELECT * FROM jsonb_to_recordset($1::jsonb) AS i(
            execution_id uuid, workspace_id uuid, caller text, preview_id uuid, digest text, idempotency_key text,
            lease_token uuid, traceparent text)
        ), usable AS (
          SELECT p.*, i.execution_id AS id_to_be, i.idempotency_key, i.lease_token, i.traceparent
            FROM input i, previews p, connections c
           WHERE p.id = i.preview_id AND p.workspace_id = i.workspace_id AND p.caller = i.caller
             AND p.execution_id IS NULL AND p.expires_at > now() AND i.digest IN ('', p.digest)
             AND (p.action_type, p.action_version) IN (SELECT * FROM unnest($2::text[], $3::int[]))
             AND c.id = p.connection_id AND c.workspace_id = p.workspace_id
             AND c.enabled AND c.version = p.connection_version
           ORDER BY p.id FOR UPDATE OF p  -- in one order everywhere, so that instances don't wait for each other
        ), made AS (
          INSERT INTO action_executions AS e
            (id, workspace_id, caller, idempotency_key, fingerprint, preview_id, provider, action_type, action_version,
             connection_id, parameters, traceparent, status, attempt_count, attempt_started_at, lease_token,
             lease_until)
          SELECT DISTINCT ON (id)
                 id_to_be, workspace_id, caller, idempotency_key, fingerprint, id, provider, action_type,
                 action_version, connection_id, parameters, traceparent, 'executing', 1, now(), lease_token, now() + $4
            FROM usable
          ON CONFLICT ON CONSTRAINT action_executions_idempotency DO NOTHING
          RETURNING {EXECUTION}, e.workspace_id, e.parameters, e.traceparent, e.lease_token
        ), used AS (
          UPDATE previews p SET execution_id = e.id FROM made e WHERE p.id = e.preview_id
        ), logged AS (
          INSERT INTO audit_logs ({", ".join(COLUMNS)})
          SELECT {", ".join(f"u.{name}" if name in _FROM_PREVIEW else f"l.{name}" for name in COLUMNS)}
            FROM jsonb_populate_recordset(NULL::audit_logs, $5::jsonb) l
            JOIN made e ON l.target = 'executions/' || e.id
            JOIN usable u ON u.id_to_be = e.id
        )
        SELECT e.*, c.configuration, {_SECRETS} FROM made e JOIN connections c ON c.id = e.connection_id
        """,  # noqa: S608  # the names are ours
        json.dumps(
            [
                {
                    "execution_id": str(order.execution_id),
                    "workspace_id": str(order.workspace_id),
                    "caller": order.caller,
                    "preview_id": str(order.preview_id),
                    "digest": order.digest,
                    "idempotency_key": order.idempotency_key,
                    "lease_token": str(order.lease_token),
                    "traceparent": order.call.traceparent,
                }
                for order in orders
            ]
        ),
        [action.name for action in actions],
        [action.version for action in actions],
        lease,
        as_json([order.event for order in orders]),
    )
    return {row["id"]: row for row in rows}


_FROM_PREVIEW = ("action_type", "provider", "params_hash", "params_prefix")


@dataclass(frozen=True, slots=True)
class Completion:
    """An attempt's end to record, by whoever holds the lease."""

    execution_id: UUID
    lease_token: UUID
    result: AttemptResult
    transition: Transition
    event: Event


async def complete(connection: "Connection", completions: Sequence[Completion]) -> dict[UUID, asyncpg.Record]:
    """Records attempts and what follows from them.

    Returns the executions as they are now, by the completion's event id; a lost lease has no row.
    """
    rows = await connection.fetch(
        f"""
        WITH input AS (
          SELECT * FROM jsonb_to_recordset($1::jsonb) AS i(
            execution_id uuid, lease_token uuid, event_id uuid, outcome attempt_outcome, status_code int,
            response_excerpt text, error text, state execution_state, delay float8)
        ), done AS (
          UPDATE action_executions e
             SET status = i.state, lease_token = NULL, lease_until = NULL,
                 next_attempt_at = CASE WHEN i.state = 'pending' THEN now() + i.delay * interval '1 second' END,
                 completed_at = CASE WHEN i.state IN ('success', 'failed') THEN now() END
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
        ), logged AS (
          INSERT INTO audit_logs ({", ".join(COLUMNS)})
          SELECT {", ".join(f"l.{name}" for name in COLUMNS)}
            FROM jsonb_populate_recordset(NULL::audit_logs, $2::jsonb) l
            JOIN done e ON l.id = e.event_id
        )
        SELECT {EXECUTION}, e.event_id, {ATTEMPT} FROM done e JOIN attempts a ON a.execution_id = e.id
        """,  # noqa: S608  # the names are ours
        json.dumps(
            [
                {
                    "execution_id": str(one.execution_id),
                    "lease_token": str(one.lease_token),
                    "event_id": str(one.event.id),
                    "outcome": one.result.outcome,
                    "status_code": one.result.status_code,
                    "response_excerpt": one.result.response_excerpt,
                    "error": one.result.error,
                    "state": one.transition.state,
                    "delay": one.transition.delay.total_seconds(),
                }
                for one in completions
            ]
        ),
        as_json([one.event for one in completions]),
    )
    return {row["event_id"]: row for row in rows}


async def list_lapsed(connection: "Connection", limit: int) -> list[asyncpg.Record]:
    """Executions whose worker let its lease run out. Whoever completes them is fenced by the token they still have."""
    return await connection.fetch(
        """
        SELECT id, workspace_id, provider, action_type, traceparent, attempt_count, lease_token
          FROM action_executions WHERE status = 'executing' AND lease_until <= now()
         ORDER BY lease_until LIMIT $1
        """,
        limit,
    )


async def claim(connection: "Connection", lease_token: UUID, lease: timedelta, limit: int) -> list[asyncpg.Record]:
    """Leases executions that are due and counts the attempt. Returns rows to run."""
    return await connection.fetch(
        f"""
        WITH due AS (
          SELECT id FROM action_executions WHERE status = 'pending' AND next_attempt_at <= now()
           ORDER BY next_attempt_at LIMIT $3 FOR UPDATE SKIP LOCKED
        ), claimed AS (
          UPDATE action_executions e
             SET status = 'executing', attempt_count = e.attempt_count + 1, attempt_started_at = now(),
                 lease_token = $1, lease_until = now() + $2::interval, next_attempt_at = NULL
            FROM due WHERE due.id = e.id
          RETURNING {EXECUTION}, e.workspace_id, e.parameters, e.traceparent, e.lease_token
        )
        SELECT e.*, c.configuration, {_SECRETS} FROM claimed e JOIN connections c ON c.id = e.connection_id
        """,  # noqa: S608  # the names are ours
        lease_token,
        lease,
        limit,
    )


async def hand_back(connection: "Connection", execution_id: UUID, lease_token: UUID) -> None:
    """Gives up a lease under which nothing was sent: the attempt does not count, and is due again."""
    await connection.execute(
        """
        UPDATE action_executions
           SET status = 'pending', attempt_count = attempt_count - 1, lease_token = NULL, lease_until = NULL,
               next_attempt_at = now()
         WHERE id = $1 AND lease_token = $2 AND status = 'executing'
        """,
        execution_id,
        lease_token,
    )
