"""The command `relay`.

Commands import what they need when they run: the help and the commands over gRPC start without the server's modules.
"""

import sys
from typing import Annotated

import typer

from relay_grpc.cli import (
    actions,
    audit,
    audit_operator,
    connections,
    database,
    executions,
    halts,
    keys,
    limits,
    roles,
    server,
)
from relay_grpc.cli.client import Target
from relay_grpc.cli.failures import EPILOG, Failure

SERVER = "Server and database"
API = "Over gRPC"
CONNECTING = "Options for what goes over gRPC"

# A traceback with local variables would show keys.
app = typer.Typer(
    epilog=EPILOG, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)


for command in (server.serve, server.demo, database.migrate, database.bootstrap, database.keygen, database.rewrap):
    app.command(rich_help_panel=SERVER)(command)
app.add_typer(limits.app, name="limits", rich_help_panel=SERVER)
for switch in (halts.halt, halts.resume, halts.halts):
    app.command(rich_help_panel=SERVER)(switch)
for of_operator in (audit_operator.erase, audit_operator.drop, audit_operator.keys):
    audit.app.command(rich_help_panel=SERVER)(of_operator)
app.command(rich_help_panel=API)(keys.whoami)
for group in (keys, roles, connections, actions, executions, audit):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2], rich_help_panel=API)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"relay {version('relay-grpc')}")
        raise typer.Exit


@app.callback()
def relay(
    ctx: typer.Context,
    address: Annotated[
        str, typer.Option(envvar="RELAY_ADDRESS", metavar="HOST:PORT", help="The server.", rich_help_panel=CONNECTING)
    ] = "127.0.0.1:50051",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="RELAY_API_KEY",
            metavar="KEY",
            help="Your key. Unset: on this machine, the admin key of its development server.",
            rich_help_panel=CONNECTING,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="RELAY_TOKEN",
            metavar="TOKEN",
            help="Your token, if you sign in as a user instead.",
            rich_help_panel=CONNECTING,
        ),
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option(
            envvar="RELAY_WORKSPACE",
            metavar="ID",
            help="The workspace, if you have a role in several.",
            rich_help_panel=CONNECTING,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            metavar="",
            help="Plaintext to another machine, which shows the key to the network. Otherwise TLS.",
            rich_help_panel=CONNECTING,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON document.", rich_help_panel=CONNECTING)
    ] = False,
    _: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Relay: the door a backend goes through before it does something it can't take back."""
    ctx.obj = Target(address, api_key or None, token or None, workspace or None, insecure, as_json)


def main() -> None:
    """Runs the command that the arguments name and ends the process."""
    try:
        app(prog_name="relay")
    except Failure as failure:
        failure.show()
        sys.exit(failure.code)
