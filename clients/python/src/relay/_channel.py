"""How both clients reach a server: the targets and credentials they take, TLS or plaintext, the channel's options."""

import ipaddress
import json
import re
from collections.abc import Callable
from typing import NamedTuple

import grpc

_HOST_AND_PORT = re.compile(r"(?:dns:///)?(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}")
_CREDENTIAL = re.compile(r"[!-~]+")
_WORKSPACE = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

# Reads, and what is safe to repeat: a second Preview is only another preview, Execute is recognised by its idempotency
# key (the preview's id where none is given), and revoking or stopping twice is doing it once. What creates is not among
# them, nor ResendExecution, nor what would not find the second time what it took away or settled the first time, nor
# AssignRole, which could undo what somebody else did in between. What of a watch or a tail had begun, `_call` resumes.
REPEATABLE = {
    "relay.v1.AuthService": (
        "WhoAmI",
        "GetApiKey",
        "ListApiKeys",
        "RevokeApiKey",
        "VerifyApiKey",
        "ListRoles",
        "ListRoleAssignments",
    ),
    "relay.v1.ConnectionsService": ("GetConnection", "ListConnections"),
    "relay.v1.ActionsService": (
        "ListActions",
        "Preview",
        "GetPreview",
        "Execute",
        "GetExecution",
        "ListExecutions",
        "ListAttempts",
        "WatchExecution",
        "GetRecovery",
        "CancelRecovery",
    ),
    "relay.v1.AuditService": (
        "ListEvents",
        "GetEvent",
        "TailEvents",
        "GetCheckpoint",
        "GetInclusionProof",
        "GetConsistencyProof",
    ),
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

Token = str | Callable[[], str]
Metadata = tuple[tuple[str, str], ...]
Caller = Callable[[], Metadata]


class Endpoint(NamedTuple):
    """What a channel needs. credentials: None means plaintext."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, str | int], ...]


def caller(api_key: str | None, token: Token | None, workspace: str | None) -> Caller:
    """What tells the metadata of each call: the credential as it is then, and the workspace.

    Raises ValueError, never with a credential in it, for what `connect` was given and, when told, for what a token
    turned out to be.
    """
    if (api_key is None) == (token is None):
        raise ValueError("give either an api_key or a token")
    if workspace is not None and not _WORKSPACE.fullmatch(workspace):
        raise ValueError("workspace must be the workspace's id, a UUID")
    meant = () if workspace is None else (("x-relay-workspace", workspace),)
    if callable(token):
        current = token
        return lambda: (_authorization("token", current()), *meant)
    told = (_authorization("token", token) if api_key is None else _authorization("api_key", api_key), *meant)
    return lambda: told


def _authorization(name: str, credential: str | None) -> tuple[str, str]:
    if not isinstance(credential, str) or not _CREDENTIAL.fullmatch(credential):
        raise ValueError(f"{name} must be the credential alone: printable ASCII, no spaces, no line end, no 'Bearer'")
    return "authorization", f"Bearer {credential}"


def endpoint(target: str, tls: bool | grpc.ChannelCredentials | None, insecure: bool) -> Endpoint:
    """Checks what `connect` was given. Raises ValueError."""
    local = _is_local(target)
    # A proxy from the environment would take a local call off this host, key and all.
    options = (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if local else _OPTIONS
    credentials = _credentials(tls, insecure, local)
    return Endpoint(target, credentials, options)


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
        raise ValueError("plaintext would show the credential to the network: use TLS, or say insecure=True")
    if isinstance(tls, grpc.ChannelCredentials):
        return tls
    return grpc.ssl_channel_credentials() if tls else None
