"""How events are written in exports, event by event. No I/O.

Values that were erased are absent. Rows are those of places.events_at.
"""

import csv
import io
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from relay_grpc.audit.event import ERASABLE, erased, leaf_of, public_name, salts_of

TIME = "%Y-%m-%dT%H:%M:%S.%fZ"  # as in leaves
Row = Any  # a mapping by column: asyncpg.Record, without asyncpg
# The last line of a JSONL export says so.
VALUES_STAY = (
    "These are the values as they were when this was exported: what is erased from the log later stays in this file "
    "until somebody deletes it."
)


def line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def jsonl(row: Row) -> bytes:
    """What is proven of an event (relay.proofs), and the values and salts that are left of it."""
    values = {public_name(name): row[name] for name in ERASABLE if row[name]}
    return line({"leaf_index": row["leaf_index"], "event": leaf_of(row), "values": values, "salts": salts_of(row)})


# CSV (RFC 4180)

_CSV = (
    *("leaf_index", "id", "created_at", "actor_type", "actor_id", "actor_name", "action", "target", "action_type"),
    *("provider", "status", "reason", "scopes", "request_id", "trace_id", "idempotency_key_hash", "params_hash"),
    *("params_prefix", "peer", "duration", "count", "note"),
)
CSV_HEADER = ",".join([*map(public_name, _CSV), "erased_fields"]).encode() + b"\r\n"


def csv_line(row: Row) -> bytes:
    """Lists are separated by spaces; the duration is in seconds."""
    written = io.StringIO()
    csv.writer(written).writerow([*(_cell(row[name]) for name in _CSV), _cell(erased(row))])
    return written.getvalue().encode()


def _cell(value: Any) -> str:
    if isinstance(value, str):
        # Spreadsheets run a cell that begins so as a formula, and with an apostrophe they don't (OWASP, CSV Injection).
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, datetime):
        return value.strftime(TIME)
    if isinstance(value, timedelta):
        return f"{value.total_seconds():.6f}"
    return "" if value is None else str(value)


# OCSF 1.3.0, API Activity: https://schema.ocsf.io/1.3.0/classes/api_activity

OCSF_VERSION = "1.3.0"
_CLASS = 6003
_CREATE, _READ, _UPDATE, _DELETE, _OTHER = 1, 2, 3, 4, 99
_ACTIVITIES = MappingProxyType(
    dict.fromkeys(("Create", "Assign", "Preview", "Execute", "Recover", "Start", "Complete"), _CREATE)
    | dict.fromkeys(("Get", "List", "Watch", "Export", "Tail", "Verify", "Who"), _READ)
    | dict.fromkeys(("Update", "Rotate", "Cancel", "Resend", "Reconcile", "Set", "Approve", "Reject"), _UPDATE)
    | dict.fromkeys(("Delete", "Revoke", "Remove"), _DELETE)
)
_SEVERITIES = MappingProxyType({"success": 1, "failed": 2, "denied": 3})  # informational, low, medium
_UNMAPPED = ("note", "idempotency_key_hash", "params_hash", "params_prefix", "action_type", "provider")


def ocsf(row: Row) -> bytes:
    activity = _activity(row["action"])
    service, _, operation = row["action"].rpartition(".")
    # What it leaves out of an event has its own name in `unmapped`.
    unmapped: dict[str, Any] = {"leaf_index": row["leaf_index"], "scopes": row["scopes"]}
    unmapped |= {public_name(name): row[name] for name in _UNMAPPED if row[name]}
    if gone := erased(row):
        unmapped["erased_fields"] = gone
    content: dict[str, Any] = {
        "category_uid": 6,
        "class_uid": _CLASS,
        "activity_id": activity,
        "type_uid": _CLASS * 100 + activity,
        "time": round(row["created_at"].timestamp() * 1000),
        "severity_id": _SEVERITIES[row["status"]],
        "status_id": 1 if row["status"] == "success" else 2,
        "count": row["count"],
        "duration": round(row["duration"].total_seconds() * 1000),
        "metadata": {
            "version": OCSF_VERSION,
            "product": {"name": "Relay", "vendor_name": "Relay"},
            "uid": str(row["id"]),
            "tenant_uid": str(row["workspace_id"]),
            "correlation_uid": row["trace_id"] or row["request_id"],
        },
        "actor": _ocsf_actor(row),
        "api": {"operation": operation, "service": {"name": service}, "request": {"uid": row["request_id"]}},
        "src_endpoint": {"ip": row["peer"]} if row["peer"] else {"name": "unknown"},
        "unmapped": unmapped,
    }
    if row["reason"]:
        content["status_detail"] = row["reason"]
    if activity == _OTHER:
        content["activity_name"] = row["action"]
    if row["target"]:
        content["resources"] = [{"uid": row["target"]}]
    return line(content)


def _activity(action: str) -> int:
    """What an RPC does, by the verb that its name begins with."""
    name = action.rpartition(".")[2]
    return next((activity for verb, activity in _ACTIVITIES.items() if name.startswith(verb)), _OTHER)


def _ocsf_actor(row: Row) -> dict[str, Any]:
    kind = row["actor_type"]
    if kind in ("system", "operator"):
        return {"app_name": "Relay" if kind == "system" else "relay, run by an operator"}
    type_id = {"user": 1, "api_key": 99}.get(kind, 0)
    user = {"type_id": type_id, "type": kind, "uid": row["actor_id"] or "unknown"}
    return {"user": user | ({"name": row["actor_name"]} if row["actor_name"] else {})}
