"""`relay keys` and `relay whoami`."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from relay_grpc.cli import values
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.output import fields, listing, moment, show, tell_secrets, when, word

if TYPE_CHECKING:
    from relay.v1 import auth_pb2

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


def whoami(ctx: typer.Context, as_json: Json = False) -> None:
    """Show whom the server takes you for, and what you may do."""
    with connected(ctx) as relay:
        principal = relay.auth.who_am_i()
    show(principal, _principal, as_json=as_json)


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What people call it, 1 to 64 characters.")],
    role: Annotated[str, typer.Option(metavar="ROLE", help="admin, developer or viewer.")],
    scope: Annotated[
        list[str] | None, typer.Option(metavar="SCOPE", help="Keep only this scope of the role. Repeatable.")
    ] = None,
    expires_in: Annotated[
        timedelta | None,
        typer.Option(parser=values.duration, metavar="DURATION", help="Such as 12h or 90d. Unset: it does not expire."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an API key and show it, this once."""
    expire_time = datetime.now(UTC) + expires_in if expires_in else None
    with connected(ctx) as relay:
        key = relay.auth.create_api_key(name, role, scopes=scope or (), expire_time=expire_time)
    show(key, _key, as_json=as_json)
    if not as_json:
        tell_secrets({"key": key.secret})


@app.command("list")
def list_keys(ctx: typer.Context, as_json: Json = False) -> None:
    """List the keys of the workspace, newest first; revoked and expired ones too."""
    with connected(ctx) as relay:
        found = list(relay.auth.list_api_keys())
    show(found, _keys, as_json=as_json)


@app.command()
def revoke(
    ctx: typer.Context, key_id: Annotated[str, typer.Argument(metavar="ID", help="A key's id.")], as_json: Json = False
) -> None:
    """Revoke a key for good."""
    with connected(ctx) as relay:
        key = relay.auth.revoke_api_key(key_id)
    show(key, _key, as_json=as_json)


def _principal(principal: "auth_pb2.Principal") -> RenderableType:
    return fields(
        {
            "id": principal.id,
            "name": principal.name,
            "type": word(principal, "type"),
            "workspace": principal.workspace_id,
            "role": principal.role,
            "scopes": " ".join(principal.scopes),
            "expires": moment(principal, "expire_time"),
        }
    )


def _key(key: "auth_pb2.ApiKey") -> RenderableType:
    return fields(
        {
            "id": key.id,
            "name": key.name,
            "role": key.role,
            "scopes": " ".join(key.scopes),
            "created": moment(key, "create_time"),
            "expires": moment(key, "expire_time"),
            "revoked": moment(key, "revoke_time"),
        }
    )


def _keys(keys: list["auth_pb2.ApiKey"]) -> RenderableType:
    return listing(
        ("ID", "NAME", "ROLE", "LAST USED"),
        ((key.id, key.name, key.role, _use(key)) for key in keys),
        none="No keys.",
    )


def _use(key: "auth_pb2.ApiKey") -> str | Text:
    if key.HasField("revoke_time"):
        return Text("revoked", "red")
    if key.HasField("expire_time") and key.expire_time.ToDatetime(tzinfo=UTC) <= datetime.now(UTC):
        return Text("expired", "yellow")
    return when(key.last_used_time) if key.HasField("last_used_time") else "never"
