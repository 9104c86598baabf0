"""Rows of connections as messages of relay.v1.connections. No I/O."""

import json
from datetime import datetime
from typing import Any

from relay.v1 import connections_pb2

from relay_grpc.actions.signing import Scheme
from relay_grpc.connections import configuration

Row = Any  # a mapping by column: asyncpg.Record, without asyncpg

SCHEMES = {
    Scheme.HMAC: connections_pb2.SIGNATURE_SCHEME_HMAC_SHA256,
    Scheme.ED25519: connections_pb2.SIGNATURE_SCHEME_ED25519,
}


def connection(row: Row, *, signing_secret: str = "") -> connections_pb2.Connection:
    """row: of store.CONNECTION. signing_secret: the new one, in the only answer that holds it."""
    return connections_pb2.Connection(
        id=str(row["id"]),
        name=row["name"],
        provider=row["provider"],
        version=row["version"],
        enabled=row["enabled"],
        disabled_reason=row["disabled_reason"],
        default=row["is_default"],
        webhook=configuration.message(json.loads(row["configuration"])),
        create_time=row["created_at"],
        update_time=row["updated_at"],
        signing_secret=signing_secret,
        health=connections_pb2.ConnectionHealth(
            breaker_state=f"BREAKER_STATE_{row['breaker'].upper()}",
            consecutive_failures=row["failures"],
            failing_since_time=row["failing_since"],
            next_probe_time=row["open_until"],
        ),
        signing_keys=map(_signing_key, json.loads(row["signing_keys"])),
    )


def _signing_key(key: Row) -> connections_pb2.SigningKey:
    return connections_pb2.SigningKey(
        id=key["id"],
        scheme=SCHEMES[Scheme(key["kind"])],
        public_key=key["public_key"],
        create_time=datetime.fromisoformat(key["created_at"]),
        expire_time=datetime.fromisoformat(key["expires_at"]) if key["expires_at"] else None,
    )
