"""The configuration of a webhook connection: what callers set, what is stored, what they are shown. No I/O.

Stored, as JSON: "url" and "body_signature", and where they are set "headers" (their names, sorted), "retry_delays" and
"timeout" (seconds). The values of headers are secrets, and stored as those are.
"""

from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any

from relay.v1 import connections_pb2

from relay_grpc import errors

# Of relay.v1.WebhookConfiguration, in its order.
FIELDS = ("url", "body_signature", "headers", "retry_policy", "timeout")

# Those that Relay sets, that frame the message, and that end at the next hop (RFC 9110, section 7.6.1).
_RESERVED = frozenset(
    (
        *("host", "user-agent", "accept-encoding", "x-signature", "traceparent", "tracestate"),
        *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect", "http2-settings"),
    )
)
_RESERVED_PREFIXES = ("content-", "proxy-", "webhook-")


def stored(webhook: connections_pb2.WebhookConfiguration, fields: Collection[str] = FIELDS) -> dict[str, Any]:
    """What these fields become in the stored configuration. None: it has no such member."""
    delays = [delay.ToTimedelta().total_seconds() for delay in webhook.retry_policy.delays]
    members = {
        "url": ("url", webhook.url),
        "body_signature": ("body_signature", webhook.body_signature),
        "headers": ("headers", sorted(webhook.headers, key=str.lower) or None),
        "retry_policy": ("retry_delays", delays if webhook.HasField("retry_policy") else None),
        "timeout": ("timeout", webhook.timeout.ToTimedelta().total_seconds() if webhook.HasField("timeout") else None),
    }
    return dict(members[field] for field in fields)


def merged(configuration: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with these members in place of its own, or without them where they are None."""
    return {name: value for name, value in {**configuration, **changes}.items() if value is not None}


def message(configuration: Mapping[str, Any]) -> connections_pb2.WebhookConfiguration:
    """What callers are shown: the names of headers, with empty values."""
    webhook = connections_pb2.WebhookConfiguration(
        url=configuration["url"],
        body_signature=configuration["body_signature"],
        headers=dict.fromkeys(configuration.get("headers", ()), ""),
    )
    delays = configuration.get("retry_delays")
    if delays is not None:
        webhook.retry_policy.SetInParent()
        for delay in delays:
            webhook.retry_policy.delays.add().FromTimedelta(timedelta(seconds=delay))
    if "timeout" in configuration:
        webhook.timeout.FromTimedelta(timedelta(seconds=configuration["timeout"]))
    return webhook


def headers(asked: Mapping[str, str], kept: Mapping[str, str], field: str) -> dict[str, str]:
    """The values of the headers asked for; an empty one stands for the one that is kept. kept: by lower-case name.

    Raises errors.InvalidRequest about the field, whose text quotes nothing that the caller wrote.
    """
    problems = list(_problems(asked, kept))
    if problems:
        raise errors.InvalidRequest([(field, problem) for problem in problems])
    return {name: value or kept[name.lower()] for name, value in asked.items()}


def _problems(asked: Mapping[str, str], kept: Mapping[str, str]) -> Iterator[str]:
    names = [name.lower() for name in asked]
    for name in sorted({*names} & _RESERVED):
        yield f"{name} is set by Relay or by HTTP"
    for prefix in _RESERVED_PREFIXES:
        if any(name.startswith(prefix) for name in names):
            yield f"{prefix}* is set by Relay or by HTTP"
    if len({*names}) < len(names):
        yield "two names differ in upper and lower case alone"
    if any(not value and name.lower() not in kept for name, value in asked.items()):
        yield "a value is empty, and there is none to keep" if kept else "a value is empty"
    if any(value != value.strip(" ") for value in asked.values()):
        yield "a value begins or ends with a space, which HTTP does not keep"
