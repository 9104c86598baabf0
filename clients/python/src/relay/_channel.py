"""How both clients reach a server: the targets and keys they take, TLS or plaintext, and the channel's options."""

import ipaddress
import json
import re
from typing import NamedTuple

import grpc

_HOST_AND_PORT = re.compile(r"(?:dns:///)?(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}")
_KEY = re.compile(r"[!-~]+")

# Reads, and what is safe to repeat: a second Preview is only another preview, Execute is recognised by its idempotency
# key (the preview's id where none is given), and revoking twice is revoking once. What creates is not among them.
REPEATABLE = {
    "relay.v1.AuthService": ("WhoAmI", "ListApiKeys", "RevokeApiKey"),
    "relay.v1.ConnectionsService": ("GetConnection", "ListConnections"),
    "relay.v1.ActionsService": (
        "ListActions",
        "Preview",
        "GetPreview",
        "Execute",
        "GetExecution",
        "ListExecutions",
        "ListAttempts",
    ),
    "relay.v1.AuditService": ("ListEvents",),
}

# gRFC A6. Throttling: once half of the tokens are gone (a failure costs one, a success gives a tenth back), failures
# are no longer retried, so that retries do not hold a struggling server down.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method} for service in REPEATABLE for method in REPEATABLE[service]
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}

_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # The most that servers with gRPC's defaults put up with, and only during calls. It also sets TCP_USER_TIMEOUT
    # (gRFC A18): a connection that died in silence is left after 20 s, not after the kernel's quarter of an hour.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
)

Metadata = tuple[tuple[str, str], ...]


class Endpoint(NamedTuple):
    """What a channel needs. credentials: None means plaintext. metadata: goes with every call and holds the key."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, str | int], ...]
    metadata: Metadata


def endpoint(target: str, api_key: str, tls: bool | grpc.ChannelCredentials | None, insecure: bool) -> Endpoint:
    """Checks what `connect` was given. Raises ValueError, never with the key in it."""
    if not _KEY.fullmatch(api_key or ""):
        raise ValueError("api_key must be the key alone: printable ASCII, no spaces, no line end, no 'Bearer'")
    local = _is_local(target)
    # A proxy from the environment would take a local call off this host, key and all.
    options = (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if local else _OPTIONS
    credentials = _credentials(tls, insecure, local)
    return Endpoint(target, credentials, options, (("authorization", f"Bearer {api_key}"),))


def _is_local(target: str) -> bool:
    """Whether calls to the target stay on this host."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    match = _HOST_AND_PORT.fullmatch(target)
    if not match:
        raise ValueError("target must be HOST:PORT, [IPV6]:PORT, dns:///HOST:PORT or unix:PATH, without http://")
    host = match["host"].strip("[]").lower()
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _credentials(
    tls: bool | grpc.ChannelCredentials | None, insecure: bool, local: bool
) -> grpc.ChannelCredentials | None:
    if tls is None:
        tls = not (local or insecure)
    if tls and insecure:
        raise ValueError("insecure=True asks for plaintext and tls for TLS: give one of them")
    if not (tls or insecure or local):
        raise ValueError("plaintext would show the key to the network: use TLS, or say insecure=True")
    if isinstance(tls, grpc.ChannelCredentials):
        return tls
    return grpc.ssl_channel_credentials() if tls else None
