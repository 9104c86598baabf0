"""What an UpdateConnection makes of a connection. No I/O."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.v1 import connections_pb2

from relay_grpc import errors
from relay_grpc.actions.signing import Scheme
from relay_grpc.connections import configuration
from relay_grpc.connections.messages import Row

DISABLED = "disabled by its users"
NAME_MAX = 64  # characters
_OWN = frozenset({"name", "enabled", "disabled_reason", "default"})
_WEBHOOK = frozenset(f"webhook.{field}" for field in configuration.FIELDS)


@dataclass(frozen=True, slots=True)
class Change:
    """The connection as it is to be.

    headers: the values to keep in place of those that are kept; None: these stay.
    changes_deliveries: it is another configuration than before, and previews made before no longer fit it.
    heals: what is known of the receiver's health no longer holds.
    """

    name: str
    enabled: bool
    disabled_reason: str
    default: bool
    configuration: Mapping[str, Any]
    headers: Mapping[str, str] | None = field(repr=False)
    changes_deliveries: bool
    heals: bool


def fields(request: connections_pb2.UpdateConnectionRequest) -> frozenset[str]:
    """The fields that the request changes: "name", "webhook.url" and so on. Raises errors.InvalidRequest."""
    paths = frozenset(request.update_mask.paths)
    if unknown := sorted(paths - _OWN - _WEBHOOK - {"webhook"}):
        raise errors.InvalidRequest([("update_mask", f"{path!r} can't be changed") for path in unknown])
    if not paths:
        raise errors.InvalidRequest([("update_mask", "names no field")])
    asked = (paths | _WEBHOOK) - {"webhook"} if "webhook" in paths else paths
    connection, problems = request.connection, []
    if "name" in asked and not 1 <= len(connection.name) <= NAME_MAX:
        problems.append(("connection.name", f"has 1 to {NAME_MAX} characters"))
    if "webhook.url" in asked and not connection.webhook.url:
        problems.append(("connection.webhook.url", "is needed"))
    if problems:
        raise errors.InvalidRequest(problems)
    return asked


def decide(
    row: Row, asked: connections_pb2.Connection, fields: frozenset[str], kept: Mapping[str, str] | None
) -> Change:
    """What the connection becomes.

    row: of store.CONNECTION. fields: of `asked`, to be changed. kept: the values of the headers that it has; None: they
    can't be decrypted. Raises errors.Contention for a version that it is no longer at, and errors.InvalidRequest.
    """
    if asked.version not in (0, row["version"]):
        raise errors.Contention(f"the connection is at version {row['version']} by now: look at it again")
    before = json.loads(row["configuration"])
    changed = [field for field in configuration.FIELDS if f"webhook.{field}" in fields]
    after = configuration.merged(before, configuration.stored(asked.webhook, changed))
    check_body_signature(after, newest_scheme(row), "connection.webhook.body_signature")
    headers = _headers(asked.webhook.headers, kept) if "webhook.headers" in fields else None
    if headers == kept:
        headers = None
    enabled = asked.enabled if "enabled" in fields else row["enabled"]
    changes_deliveries = after != before or headers is not None
    return Change(
        name=asked.name if "name" in fields else row["name"],
        enabled=enabled,
        disabled_reason=_disabled_reason(row, asked, fields, enabled=enabled),
        default=asked.default if "default" in fields else row["is_default"],
        configuration=after,
        headers=headers,
        changes_deliveries=changes_deliveries,
        heals=changes_deliveries or ("enabled" in fields and enabled),
    )


def newest_scheme(row: Row) -> Scheme:
    """What the newest secret signs with."""
    keys = json.loads(row["signing_keys"])
    return Scheme(keys[0]["kind"]) if keys else Scheme.HMAC


def check_body_signature(settings: Mapping[str, Any], newest: Scheme, field: str) -> None:
    """Raises errors.InvalidRequest about the field where X-Signature is asked for without a secret that makes it."""
    if settings["body_signature"] and newest is not Scheme.HMAC:
        raise errors.InvalidRequest([(field, "X-Signature needs an HMAC secret, and the newest signs with Ed25519")])


def _headers(asked: Mapping[str, str], kept: Mapping[str, str] | None) -> dict[str, str]:
    field = "connection.webhook.headers"
    if kept is None and not all(asked.values()):
        raise errors.InvalidRequest([(field, "the values that are kept can't be decrypted: give all of them anew")])
    return configuration.headers(asked, {name.lower(): value for name, value in (kept or {}).items()}, field)


def _disabled_reason(row: Row, asked: connections_pb2.Connection, fields: frozenset[str], *, enabled: bool) -> str:
    if not enabled:
        told = asked.disabled_reason if "disabled_reason" in fields else row["disabled_reason"]
        return told or DISABLED
    if "disabled_reason" in fields and asked.disabled_reason:
        raise errors.InvalidRequest([("connection.disabled_reason", "an enabled connection has none")])
    return ""
