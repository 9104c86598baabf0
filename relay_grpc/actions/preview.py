"""What a preview is bound to. No I/O."""

import hashlib
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import rfc8785


def fingerprint(*, action: str, version: int, connection_id: UUID, parameters: Mapping[str, Any]) -> bytes:
    """SHA-256 over what makes two requests the same, whoever sends them: equal ones may share an idempotency key."""
    return hashlib.sha256(rfc8785.dumps([action, version, str(connection_id), dict(parameters)])).digest()


def digest(
    *,
    action: str,
    action_version: int,
    workspace_id: UUID,
    caller: str,
    connection_id: UUID,
    connection_version: int,
    parameters: Mapping[str, Any],
) -> str:
    """SHA-256, in hex, over everything that a confirmation is bound to, as canonical JSON (RFC 8785)."""
    bound: dict[str, Any] = {
        "action": action,
        "action_version": action_version,
        "workspace_id": str(workspace_id),
        "caller": caller,
        "connection_id": str(connection_id),
        "connection_version": connection_version,
        "parameters": dict(parameters),
    }
    return hashlib.sha256(rfc8785.dumps(bound)).hexdigest()


# `digest` as PostgreSQL computes it from a row p of previews. to_json quotes a text as RFC 8785 does; the members stand
# in its order, and the parameters are stored in its form.
DIGEST_SQL = """
    encode(sha256(convert_to(
      '{"action":' || to_json(p.action_type) || ',"action_version":' || p.action_version
      || ',"caller":' || to_json(p.caller) || ',"connection_id":"' || p.connection_id
      || '","connection_version":' || p.connection_version || ',"parameters":' || p.parameters
      || ',"workspace_id":"' || p.workspace_id || '"}', 'UTF8')), 'hex')
"""
