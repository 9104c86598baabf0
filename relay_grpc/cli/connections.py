"""`relay connections`."""

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay_grpc.cli import values
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.connection_views import list_view, show_new, view
from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.output import plain, show, tell

if TYPE_CHECKING:
    from relay.v1 import connections_pb2

app = typer.Typer(
    help="Make and look at the places where actions go, change them, rotate their secrets.", no_args_is_help=True
)

Id = Annotated[str, typer.Argument(metavar="ID", help="A connection's id.")]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="What people call it, 1 to 64 characters.")]
Url = Annotated[str, typer.Option(metavar="URL", help="Where the receiver is; https outside development.")]
Headers = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=values.headers,
        metavar="JSON",
        help="Sent with every delivery: a JSON object of texts, @FILE, or - for standard input.",
    ),
]
Delays = Annotated[
    Any,
    typer.Option(
        parser=values.durations,
        metavar="DURATIONS",
        help='The waits between attempts, such as 5s,5m,1h; "none" for one attempt alone.',
    ),
]
Timeout = Annotated[
    timedelta | None,
    typer.Option(parser=values.duration, metavar="DURATION", help="The most that an attempt may take, 1s to 30s."),
]
SigningSecret = Annotated[
    str,
    typer.Option(
        parser=values.secret,
        metavar="SECRET",
        help="whsec_ and base64: @FILE, or - for standard input. Unset: the server makes one.",
    ),
]
ValidateOnly = Annotated[bool, typer.Option("--validate-only", metavar="", help="Check everything, change nothing.")]


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What people call it, 1 to 64 characters.")],
    url: Url,
    default: Annotated[
        bool, typer.Option("--default", metavar="", help="Serve previews that name no connection.")
    ] = False,
    body_signature: Annotated[
        bool, typer.Option("--body-signature", metavar="", help="Send the older header X-Signature too.")
    ] = False,
    headers: Headers = None,
    retry_delays: Delays = None,
    timeout: Timeout = None,
    ed25519: Annotated[
        bool, typer.Option("--ed25519", metavar="", help="Sign with a private key that never leaves the server.")
    ] = False,
    signing_secret: SigningSecret = "",
    validate_only: ValidateOnly = False,
    as_json: Json = False,
) -> None:
    """Connect a webhook receiver and show its signing secret, this once."""
    with connected(ctx) as relay:
        made = relay.connections.create_webhook(
            name,
            url,
            default=default,
            body_signature=body_signature,
            headers=headers,
            retry_delays=retry_delays,
            attempt_timeout=timeout,
            signing_secret=signing_secret,
            signature_scheme=_scheme(ed25519=ed25519),
            validate_only=validate_only,
        )
    show_new(made, as_json=as_json)
    _tell_validated(validate_only)


@app.command()
def get(ctx: typer.Context, connection_id: Id, as_json: Json = False) -> None:
    """Show one connection, how it does, and what signs."""
    with connected(ctx) as relay:
        connection = relay.connections.get(connection_id)
    show(connection, view, as_json=as_json)


@app.command("list")
def list_connections(ctx: typer.Context, as_json: Json = False) -> None:
    """List the connections of the workspace, newest first."""
    with connected(ctx) as relay:
        found = list(relay.connections.list())
    show(found, list_view, as_json=as_json)


@app.command()
def update(
    ctx: typer.Context,
    connection_id: Id,
    name: Name = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Where the receiver is now.")] = None,
    default: Annotated[
        bool | None, typer.Option("--default/--no-default", help="Serve previews that name no connection.")
    ] = None,
    body_signature: Annotated[
        bool | None, typer.Option("--body-signature/--no-body-signature", help="Send the older header X-Signature too.")
    ] = None,
    headers: Annotated[
        dict[str, Any] | None,
        typer.Option(
            parser=values.headers,
            metavar="JSON",
            help='Those to send from now on, where "" keeps a value: a JSON object of texts, @FILE, or -.',
        ),
    ] = None,
    retry_delays: Delays = None,
    timeout: Timeout = None,
    reset: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="Back to the server's own: retry-delays or timeout. Repeatable."),
    ] = None,
    version: Annotated[
        int, typer.Option(min=0, show_default=False, metavar="N", help="Only if it is still at this version.")
    ] = 0,
    validate_only: ValidateOnly = False,
    as_json: Json = False,
) -> None:
    """Change a connection. Previews made before fit it no longer, unless its name or default is all that changes."""
    from relay.v1 import connections_pb2

    webhook = connections_pb2.WebhookConfiguration(url=url, body_signature=body_signature, headers=headers)
    if retry_delays is not None:
        webhook.retry_policy.CopyFrom(connections_pb2.RetryPolicy(delays=retry_delays))
    if timeout is not None:
        webhook.timeout.FromTimedelta(timeout)
    if unknown := {*(reset or ())} - {"retry-delays", "timeout"}:
        raise Failure(f"--reset: {min(unknown)!r} should be retry-delays or timeout", code=ExitCode.USAGE)
    asked = {
        "name": name is not None,
        "default": default is not None,
        "webhook.url": url is not None,
        "webhook.body_signature": body_signature is not None,
        "webhook.headers": headers is not None,
        "webhook.retry_policy": retry_delays is not None or "retry-delays" in (reset or ()),
        "webhook.timeout": timeout is not None or "timeout" in (reset or ()),
    }
    connection = connections_pb2.Connection(
        id=connection_id, version=version, name=name, default=default, webhook=webhook
    )
    _update(ctx, connection, [field for field, given in asked.items() if given], validate_only, as_json=as_json)


@app.command()
def enable(ctx: typer.Context, connection_id: Id, as_json: Json = False) -> None:
    """Deliver to a connection again: what waits goes out, and its failures are forgotten."""
    from relay.v1 import connections_pb2

    _update(ctx, connections_pb2.Connection(id=connection_id, enabled=True), ["enabled"], as_json=as_json)


@app.command()
def disable(
    ctx: typer.Context,
    connection_id: Id,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for people: at most 256 characters.")] = "",
    as_json: Json = False,
) -> None:
    """Deliver nothing to a connection. What is under way ends; what is pending waits until it is enabled."""
    from relay.v1 import connections_pb2

    connection = connections_pb2.Connection(id=connection_id, disabled_reason=reason)
    _update(ctx, connection, ["enabled", *(["disabled_reason"] if reason else [])], as_json=as_json)


@app.command()
def delete(ctx: typer.Context, connection_id: Id, yes: values.Yes = False) -> None:
    """Delete a connection and its secrets, unless an execution that has not ended uses it."""
    values.need_somebody(yes)
    with connected(ctx) as relay:
        connection = relay.connections.get(connection_id)
        values.need_consent(f"Delete the connection {plain(connection.name)} and its secrets?", yes)
        relay.connections.delete(connection_id)
    tell("It is deleted.", stderr=True)


@app.command("rotate-secret")
def rotate_secret(
    ctx: typer.Context,
    connection_id: Id,
    overlap: Annotated[
        timedelta,
        typer.Option(parser=values.duration, metavar="DURATION", help="How long the old secrets sign too, 0s to 7d."),
    ] = "24h",  # type: ignore[assignment]  # parsed as if it was typed
    ed25519: Annotated[
        bool | None, typer.Option("--ed25519/--hmac", help="What the new one signs with. Unset: as the newest.")
    ] = None,
    signing_secret: SigningSecret = "",
    as_json: Json = False,
) -> None:
    """Give a connection a new signing secret and show it, this once. The old ones sign beside it for a while."""
    with connected(ctx) as relay:
        connection = relay.connections.rotate_secret(
            connection_id, overlap=overlap, signing_secret=signing_secret, signature_scheme=_scheme(ed25519=ed25519)
        )
    show_new(connection, as_json=as_json)


def _update(
    ctx: typer.Context,
    connection: "connections_pb2.Connection",
    asked: list[str],
    validate_only: bool = False,
    *,
    as_json: bool,
) -> None:
    if not asked:
        raise Failure("nothing to change: give an option", code=ExitCode.USAGE)
    with connected(ctx) as relay:
        changed = relay.connections.update(connection, asked, validate_only=validate_only)
    show(changed, view, as_json=as_json)
    _tell_validated(validate_only)


def _tell_validated(validate_only: bool) -> None:
    if validate_only:
        tell("It could be done. Nothing was.", stderr=True)


def _scheme(*, ed25519: bool | None) -> "connections_pb2.SignatureScheme":
    from relay.v1 import connections_pb2

    if ed25519 is None:
        return connections_pb2.SIGNATURE_SCHEME_UNSPECIFIED
    return connections_pb2.SIGNATURE_SCHEME_ED25519 if ed25519 else connections_pb2.SIGNATURE_SCHEME_HMAC_SHA256
