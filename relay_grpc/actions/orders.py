"""What Execute commits: the preview is used up, the execution is there, and the event is logged, or none of it.

Connection first, as relay_worker.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc.actions.catalogue import Action
from relay_grpc.actions.lanes import Room
from relay_grpc.actions.leases import TARGET, WORK
from relay_grpc.actions.preview import DIGEST_SQL
from relay_grpc.actions.store import halted_sql
from relay_grpc.audit.event import Event, as_json
from relay_grpc.audit.store import COLUMNS, EVENTS, appending
from relay_grpc.call import Call

if TYPE_CHECKING:
    from relay_grpc.db import Connection


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

    def as_row(self) -> dict[str, str]:
        return {
            "execution_id": str(self.execution_id),
            "workspace_id": str(self.workspace_id),
            "caller": self.caller,
            "preview_id": str(self.preview_id),
            "digest": self.digest,
            "idempotency_key": self.idempotency_key,
            "lease_token": str(self.lease_token),
            "traceparent": self.call.traceparent,
        }


# The orders ($1) that can be carried out as they were previewed, of the actions that may run ($2 to $4), and for which
# of them there is room ($5 to $11). Previews are locked in one order everywhere, so that instances don't wait for each
# other in a circle; connections are, so that none is deleted meanwhile.
_PLACED = f"""
    input AS (
      SELECT * FROM jsonb_to_recordset($1::jsonb) AS i(
        execution_id uuid, workspace_id uuid, caller text, preview_id uuid, digest text, idempotency_key text,
        lease_token uuid, traceparent text)
    ), usable AS (
      SELECT p.*, i.execution_id AS id_to_be, i.idempotency_key, i.lease_token, i.traceparent, a.delivery, c.open_until
        FROM input i, previews p, connections c,
             unnest($2::text[], $3::int[], $4::delivery[]) a(name, version, delivery)
       WHERE p.id = i.preview_id AND p.workspace_id = i.workspace_id AND p.caller = i.caller
         AND p.execution_id IS NULL AND p.expires_at > now()
         AND p.digest = {DIGEST_SQL} AND i.digest IN ('', p.digest)
         AND a.name = p.action_type AND a.version = p.action_version
         AND c.id = p.connection_id AND c.workspace_id = p.workspace_id AND c.version = p.connection_version
         AND c.enabled
         AND NOT EXISTS (SELECT FROM halts h WHERE {halted_sql("p.workspace_id", "p.provider")})
       ORDER BY p.id FOR UPDATE OF p FOR KEY SHARE OF c
    ), placed AS (
      SELECT u.*, open_until IS NULL AND row_number() OVER (ORDER BY id) <= $5
             AND row_number() OVER (PARTITION BY workspace_id ORDER BY id) + coalesce(w.running, 0) <= $6
             AND row_number() OVER (PARTITION BY connection_id ORDER BY id) + coalesce(l.running, 0) <= $7 AS leased
        FROM (SELECT DISTINCT ON (id) * FROM usable ORDER BY id) u
        LEFT JOIN unnest($8::uuid[], $9::int[]) w(busy, running) ON w.busy = workspace_id
        LEFT JOIN unnest($10::uuid[], $11::int[]) l(busy, running) ON l.busy = connection_id
    )
"""  # noqa: S608  # the names are ours
_FROM_PREVIEW = ("action_type", "provider", "params_hash", "params_prefix")
_EVENTS = f"""
    SELECT {", ".join(f"{'u' if name in _FROM_PREVIEW else 'l'}.{name}" for name in COLUMNS)}
      FROM json_to_recordset($13::json) AS l{EVENTS}
      JOIN made e ON l.target = 'executions/' || e.id
      JOIN usable u ON u.id_to_be = e.id
"""  # noqa: S608  # the names are ours


async def commit(
    connection: "Connection", orders: Sequence[Order], actions: Sequence[Action], lease: timedelta, room: Room
) -> dict[UUID, asyncpg.Record]:
    """Uses up the previews, makes the executions, logs them, and leases those for which there is room.

    actions: what may run. Returns the rows by execution id: those with a lease_token are to be run now, the others wait
    to be claimed. An order without a row met a preview that is not there, used, expired or drifted, a connection or an
    action that is switched off, or an idempotency key that is taken: store.explain tells which.
    """
    rows = await connection.fetch(
        f"""
        WITH {_PLACED}, made AS (
          INSERT INTO action_executions AS e
            (id, workspace_id, caller, idempotency_key, fingerprint, preview_id, provider, action_type, action_version,
             connection_id, parameters, traceparent, delivery, status, attempt_count,
             attempt_started_at, lease_token, lease_until, next_attempt_at)
          SELECT id_to_be, workspace_id, caller, idempotency_key, fingerprint, id, provider, action_type,
                 action_version, connection_id, parameters, traceparent, delivery,
                 CASE WHEN leased THEN 'executing' ELSE 'pending' END::execution_state, leased::int,
                 CASE WHEN leased THEN now() END, CASE WHEN leased THEN lease_token END,
                 CASE WHEN leased THEN now() + $12::interval END, CASE WHEN NOT leased THEN now() END
            FROM placed ORDER BY id
          ON CONFLICT ON CONSTRAINT action_executions_idempotency DO NOTHING
          RETURNING {WORK}
        ), used AS (
          UPDATE previews p SET execution_id = e.id FROM made e WHERE p.id = e.preview_id
        ), {appending(_EVENTS)}
        SELECT e.*, {TARGET} FROM made e JOIN connections c ON c.id = e.connection_id
        """,  # noqa: S608  # the names are ours
        json.dumps([order.as_row() for order in orders]),
        [action.name for action in actions],
        [action.version for action in actions],
        [action.delivery for action in actions],
        room.in_all,
        room.per_workspace,
        room.per_connection,
        *room.as_arrays(),
        lease,
        as_json([order.event for order in orders]),
    )
    return {row["id"]: row for row in rows}
