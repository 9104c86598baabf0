"""A past for a workspace: any number of events, a year of them, made by the database itself in seconds."""

from uuid import UUID

import asyncpg

from relay_grpc.audit.event import ERASABLE

MONTHS = 13
# Events by numbers, evenly over 365 days. Of every 20: 4 failed and 1 denied; of every 4, 3 are about a provider; each
# request has 3; every 5,000th is of an action of its own.
_FILL = f"""
    WITH made AS MATERIALIZED (
      SELECT (lpad(to_hex(floor(extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
              || lpad(to_hex(n % 4096), 3, '0') || '8' || substr(md5(n || $1::uuid::text), 1, 15))::uuid AS id,
             date_trunc('milliseconds', at) AS created_at, n,
             {" || ".join(["uuid_send(gen_random_uuid())"] * len(ERASABLE))} AS salts,
             'actor-' || n % 20 AS actor_id, 'somebody' AS actor_name, 'executions/' || n / 3 AS target, '' AS note,
             '10.0.0.1' AS peer, md5(n::text) AS idempotency_key_hash, md5(n::text) AS params_hash,
             '{{"payload":*}}' AS params_prefix
        FROM generate_series(1, $2::int) n,
             LATERAL (SELECT now() - interval '365 days' * (($2 - n + 1)::float8 / $2) AS at) t
    ), valued AS (
      INSERT INTO audit_values (id, workspace_id, {", ".join(ERASABLE)}, salts)
      SELECT id, $1, {", ".join(ERASABLE)}, salts FROM made
    )
    INSERT INTO audit_logs (id, workspace_id, created_at, actor_type, action, action_type, provider, status, reason,
                            scopes, request_id, trace_id, duration, count, commitments)
    SELECT id, $1, created_at, 'api_key',
           CASE WHEN n % 5000 = 0 THEN 'test.Rare' ELSE 'test.Action' || n % 4 END, 'webhook.send',
           CASE WHEN n % 4 = 3 THEN '' ELSE 'independent' END,
           (CASE n % 20 WHEN 1 THEN 'denied' WHEN 2 THEN 'failed' ELSE 'success' END)::event_outcome, '',
           '{{actions:execute}}', 'request-' || n / 3, md5(n::text), interval '5 ms', 1,
           relay_commitments(salts, {", ".join(ERASABLE)})
      FROM made
"""

# Places for them without a tree, for whoever only lists.
_PLACE = """
    WITH taken AS (DELETE FROM audit_pending RETURNING *)
    INSERT INTO audit_leaves (event_id, workspace_id, leaf_index)
    SELECT event_id, workspace_id, row_number() OVER (PARTITION BY workspace_id ORDER BY event_id) - 1 FROM taken
"""


async def fill(url: str, workspace_id: UUID, count: int, *, place: bool = False) -> None:
    """url: as superuser. place: give the events their places, unproven, instead of leaving that to a server."""
    connection = await asyncpg.connect(url)
    for ago in range(MONTHS):
        month = "date_trunc('month', now() AT TIME ZONE 'UTC') - make_interval(months => $1)"
        await connection.execute(f"SELECT relay_make_audit_month({month})", ago)
    await connection.execute(_FILL, workspace_id, count, timeout=600)
    if place:
        await connection.execute(_PLACE, timeout=600)
    await connection.close()
