"""How events get into Postgres: rows are added, never changed. Connection first; the caller owns the transaction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from relay_grpc.audit.event import ERASABLE, PROVEN, Event, as_json

if TYPE_CHECKING:
    from relay_grpc.db import Connection

_TYPES = {
    "id": "uuid",
    "workspace_id": "uuid",
    "created_at": "timestamptz",
    "actor_type": "actor_type",
    "status": "event_outcome",
    "scopes": "text[]",
    "duration": "interval",
    "count": "int",
    "salts": "bytea",
}
_PROVEN = (*PROVEN, "created_at")
COLUMNS = (*_PROVEN, *ERASABLE, "salts")
# What json_to_recordset makes of event.as_json.
EVENTS = "(" + ", ".join(f"{name} {_TYPES.get(name, 'text')}" for name in COLUMNS) + ")"


def appending(source: str) -> str:
    """CTEs that log the events which the query `source` yields, column by column as COLUMNS names them."""
    proven, erasable = ", ".join(_PROVEN), ", ".join(ERASABLE)
    return f"""
        happened AS MATERIALIZED ({source}), valued AS (
          INSERT INTO audit_values (id, workspace_id, {erasable}, salts)
          SELECT id, workspace_id, {erasable}, salts FROM happened
        ), logged AS (
          INSERT INTO audit_logs ({proven}, commitments)
          SELECT {proven}, relay_commitments(salts, {erasable}) FROM happened
        )
    """  # noqa: S608  # the names are ours


_SELECTED = ", ".join(COLUMNS)
_INSERT = f"""
    WITH {appending(f"SELECT {_SELECTED} FROM json_to_recordset($1::json) AS e{EVENTS}")} SELECT
"""  # noqa: S608  # the names are ours


async def insert(connection: "Connection", events: Sequence[Event]) -> None:
    await connection.execute(_INSERT, as_json(events))
