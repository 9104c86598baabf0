"""`relay keys` and `relay whoami`."""

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from relay_grpc.cli import values
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.output import fields, listing, moment, show, tell_secrets, when, word

if TYPE_CHECKING:
    from relay.v1 import auth_pb2

app = typer.Typer(help="Make, look at, rotate, revoke and verify API keys.", no_args_is_help=True)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="A key's id.")]


def whoami(ctx: typer.Context, as_json: Json = False) -> None:
    """Show whom the server takes you for, and what you may do."""
    with connected(ctx) as relay:
        principal = relay.auth.who_am_i()
    show(principal, _principal, as_json=as_json)


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What people call it, 1 to 64 characters.")],
    role: Annotated[str, typer.Option(metavar="ROLE", help="admin, developer, viewer, or one of 'relay roles list'.")],
    scope: Annotated[
        list[str] | None, typer.Option(metavar="SCOPE", help="Keep only this scope of the role. Repeatable.")
    ] = None,
    expires_in: Annotated[
        timedelta | None,
        typer.Option(parser=values.duration, metavar="DURATION", help="Such as 12h or 90d. Unset: it does not expire."),
    ] = None,
    calls_per_minute: Annotated[
        int,
        typer.Option(
            min=0, show_default=False, metavar="NUMBER", help="Its share of the calls budget. Unset: all of it."
        ),
    ] = 0,
    executions_per_minute: Annotated[
        int,
        typer.Option(
            min=0, show_default=False, metavar="NUMBER", help="Its share of the executions budget. Unset: all of it."
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make an API key and show it, this once."""
    expire_time = datetime.now(UTC) + expires_in if expires_in else None
    with connected(ctx) as relay:
        key = relay.auth.create_api_key(
            name,
            role,
            scopes=scope or (),
            expire_time=expire_time,
            calls_per_minute=calls_per_minute,
            executions_per_minute=executions_per_minute,
        )
    _show_new(key, as_json)


@app.command()
def get(ctx: typer.Context, key_id: KeyId, as_json: Json = False) -> None:
    """Show one key, without its secret."""
    with connected(ctx) as relay:
        key = relay.auth.get_api_key(key_id)
    show(key, _key, as_json=as_json)


@app.command("list")
def list_keys(ctx: typer.Context, as_json: Json = False) -> None:
    """List the keys of the workspace, newest first; revoked and expired ones too."""
    with connected(ctx) as relay:
        found = list(relay.auth.list_api_keys())
    show(found, _keys, as_json=as_json)


@app.command()
def rotate(
    ctx: typer.Context,
    key_id: KeyId,
    overlap: Annotated[
        timedelta,
        typer.Option(parser=values.duration, metavar="DURATION", help="How long the old key keeps working, 0s to 30d."),
    ] = "24h",  # type: ignore[assignment]  # parsed as if it was typed
    as_json: Json = False,
) -> None:
    """Replace a key by one that may do the same, and show it, this once."""
    with connected(ctx) as relay:
        key = relay.auth.rotate_api_key(key_id, overlap)
    _show_new(key, as_json)
    if overlap and not as_json:
        end = datetime.now().astimezone() + overlap
        typer.echo(f"The old key works until {end:%Y-%m-%d %H:%M} at the latest.")
    elif not as_json:
        typer.echo("The old key works no more.")


@app.command()
def revoke(ctx: typer.Context, key_id: KeyId, as_json: Json = False) -> None:
    """Revoke a key for good."""
    with connected(ctx) as relay:
        key = relay.auth.revoke_api_key(key_id)
    show(key, _key, as_json=as_json)


@app.command()
def verify(
    ctx: typer.Context,
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="The key. Unset or -: from standard input, asked for where that is a terminal; "
            "a key that is an argument stays in the shell's history.",
            show_default=False,
        ),
    ] = "-",
    scope: Annotated[
        list[str] | None, typer.Option(metavar="SCOPE", help="A scope that it must hold. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell whether somebody's key is valid in this workspace: exit code 0 where it is, 1 where it is not."""
    from relay.v1.auth_pb2 import VERIFICATION_CODE_VALID

    presented = _asked_for() if key == "-" else key
    with connected(ctx) as relay:
        verdict = relay.auth.verify_api_key(presented, scopes=scope or ())
    show(verdict, _verdict, as_json=as_json)
    if verdict.code != VERIFICATION_CODE_VALID:
        raise typer.Exit(ExitCode.FAILED)


def _asked_for() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("Key", hide_input=True, err=True)).strip()
    presented = sys.stdin.read().strip()
    if not presented:
        raise Failure("there is no key on standard input", code=ExitCode.USAGE)
    return presented


def _show_new(key: "auth_pb2.ApiKey", as_json: bool) -> None:
    show(key, _key, as_json=as_json)
    if not as_json:
        tell_secrets({"key": key.secret})


def _principal(principal: "auth_pb2.Principal") -> RenderableType:
    return fields(_told(principal))


def _verdict(verdict: "auth_pb2.VerifyApiKeyResponse") -> RenderableType:
    told = _told(verdict.principal) if verdict.HasField("principal") else {}
    return fields({"verdict": word(verdict, "code"), "lacks": " ".join(verdict.missing_scopes), **told})


def _told(principal: "auth_pb2.Principal") -> dict[str, str | Text]:
    return {
        "id": principal.id,
        "name": principal.name,
        "type": word(principal, "type"),
        "workspace": principal.workspace_id,
        "role": principal.role,
        "scopes": " ".join(principal.scopes),
        "expires": moment(principal, "expire_time"),
    }


def _key(key: "auth_pb2.ApiKey") -> RenderableType:
    return fields(
        {
            "id": key.id,
            "public id": key.public_id,
            "name": key.name,
            "role": key.role,
            "scopes": " ".join(key.scopes),
            "limits": _limits(key.limits),
            "lineage": key.lineage_id,
            "creator": key.creator,
            "created": moment(key, "create_time"),
            "last used": moment(key, "last_used_time"),
            "expires": moment(key, "expire_time"),
            "retires": moment(key, "retire_time"),
            "revoked": moment(key, "revoke_time"),
        }
    )


def _limits(limits: "auth_pb2.KeyLimits") -> str:
    budgets = {"calls": limits.calls_per_minute, "executions": limits.executions_per_minute}
    own = [f"{units} {budget} a minute" for budget, units in budgets.items() if units]
    return ", ".join(own)


def _keys(keys: list["auth_pb2.ApiKey"]) -> RenderableType:
    return listing(
        ("ID", "NAME", "ROLE", "LAST USED"),
        ((key.id, key.name, key.role, _use(key)) for key in keys),
        none="No keys.",
    )


def _use(key: "auth_pb2.ApiKey") -> str | Text:
    now = datetime.now(UTC)
    if key.HasField("revoke_time"):
        return Text("revoked", "red")
    if key.HasField("expire_time") and key.expire_time.ToDatetime(UTC) <= now:
        return Text("expired", "yellow")
    if key.HasField("retire_time") and key.retire_time.ToDatetime(UTC) <= now:
        return Text("retired", "yellow")
    used = Text(when(key.last_used_time) if key.HasField("last_used_time") else "never")
    if key.HasField("retire_time"):
        used.append(f", retires {when(key.retire_time)}", "yellow")
    return used
