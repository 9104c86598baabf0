"""How `relay connections` shows connections to people."""

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from relay_grpc.cli.output import fields, length, listing, moment, plain, show, tell_secrets, word

if TYPE_CHECKING:
    from relay.v1 import connections_pb2


def show_new(connection: "connections_pb2.Connection", *, as_json: bool) -> None:
    """Shows a connection with its new secret, or the public key where the secret stays with the server."""
    show(connection, view, as_json=as_json)
    if connection.signing_secret and not as_json:
        tell_secrets({"signing secret": connection.signing_secret})


def view(connection: "connections_pb2.Connection") -> RenderableType:
    """One connection."""
    webhook = connection.webhook
    return fields(
        {
            "id": connection.id,
            "name": _name(connection),
            "disabled": Text(plain(connection.disabled_reason).plain, "red"),
            "provider": connection.provider,
            "url": webhook.url,
            "headers": ", ".join(sorted(webhook.headers, key=str.lower)),
            "signs": _signs(connection),
            "retries": _retries(webhook),
            "timeout": length(webhook.timeout) if webhook.HasField("timeout") else "",
            "breaker": _breaker(connection.health),
            "version": str(connection.version),
            "created": moment(connection, "create_time"),
            "changed": moment(connection, "update_time"),
        }
    )


def list_view(connections: list["connections_pb2.Connection"]) -> RenderableType:
    """Connections in a table."""
    return listing(
        ("ID", "NAME", "URL"),
        ((connection.id, _name(connection), connection.webhook.url) for connection in connections),
        none="No connections. 'relay connections create' makes one.",
    )


def _name(connection: "connections_pb2.Connection") -> Text:
    name = plain(connection.name)
    if connection.default:
        name.append(" (default)", "cyan")
    if not connection.enabled:
        name.append(" (disabled)", "red")
    return name


def _signs(connection: "connections_pb2.Connection") -> Text:
    """What signs, the newest first, a line each."""
    lines = []
    for key in connection.signing_keys:
        line = word(key, "scheme")
        if key.public_key:
            line.append(f" {key.public_key}")
        if key.HasField("expire_time"):
            line.append(f", until {moment(key, 'expire_time')}", "yellow")
        lines.append(line)
    if connection.webhook.body_signature:
        lines.append(Text("X-Signature over the body alone"))
    return Text("\n").join(lines)


def _retries(webhook: "connections_pb2.WebhookConfiguration") -> str:
    if not webhook.HasField("retry_policy"):
        return ""
    return "after " + ", ".join(map(length, webhook.retry_policy.delays)) if webhook.retry_policy.delays else "none"


def _breaker(health: "connections_pb2.ConnectionHealth") -> Text:
    told = word(health, "breaker_state")
    if health.consecutive_failures:
        told.append(f", {health.consecutive_failures} failures in a row")
        told.append(f" since {moment(health, 'failing_since_time')}")
    if health.HasField("next_probe_time"):
        told.append(f", next probe at {moment(health, 'next_probe_time')}")
    return told
