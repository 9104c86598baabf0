"""`relay connections`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.output import fields, listing, moment, plain, show, tell_secrets

if TYPE_CHECKING:
    from relay.v1 import connections_pb2

app = typer.Typer(help="Make and look at the places where actions go.", no_args_is_help=True)


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What people call it, 1 to 64 characters.")],
    url: Annotated[str, typer.Option(metavar="URL", help="Where the receiver is; https outside development.")],
    default: Annotated[
        bool, typer.Option("--default", metavar="", help="Serve previews that name no connection.")
    ] = False,
    body_signature: Annotated[
        bool, typer.Option("--body-signature", metavar="", help="Send the older header X-Signature too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Connect a webhook receiver and show its signing secret, this once."""
    with connected(ctx) as relay:
        made = relay.connections.create_webhook(name, url, default=default, body_signature=body_signature)
    show(made, _connection, as_json=as_json)
    if not as_json:
        tell_secrets({"signing secret": made.signing_secret})


@app.command()
def get(
    ctx: typer.Context,
    connection_id: Annotated[str, typer.Argument(metavar="ID", help="A connection's id.")],
    as_json: Json = False,
) -> None:
    """Show one connection."""
    with connected(ctx) as relay:
        connection = relay.connections.get(connection_id)
    show(connection, _connection, as_json=as_json)


@app.command("list")
def list_connections(ctx: typer.Context, as_json: Json = False) -> None:
    """List the connections of the workspace, newest first."""
    with connected(ctx) as relay:
        found = list(relay.connections.list())
    show(found, _connections, as_json=as_json)


def _connection(connection: "connections_pb2.Connection") -> RenderableType:
    return fields(
        {
            "id": connection.id,
            "name": _name(connection),
            "provider": connection.provider,
            "url": connection.webhook.url,
            "version": str(connection.version),
            "created": moment(connection, "create_time"),
            "changed": moment(connection, "update_time"),
        }
    )


def _connections(connections: list["connections_pb2.Connection"]) -> RenderableType:
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
