"""`relay limits`: what workspaces may spend a minute, on the database itself."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay_grpc.cli.client import Json
from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.operator import database
from relay_grpc.cli.output import listing, show_json, tell
from relay_grpc.cli.server import DataDir

if TYPE_CHECKING:
    from relay_grpc.ratelimit.overrides import WorkspaceLimits

app = typer.Typer(no_args_is_help=True, help="What workspaces may spend a minute: the operator's, on the database.")
DEFAULT = "default"  # what the settings of the server say


@app.command()
def show(
    workspace: Annotated[str | None, typer.Option(metavar="NAME", help="This workspace alone.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show the limits of workspaces."""
    import asyncio

    from relay_grpc.ratelimit.overrides import workspaces

    with database(data_dir) as url:
        found = asyncio.run(workspaces(url, workspace))
    if workspace is not None and not found:
        raise _unknown(workspace)
    if as_json:
        show_json([_document(one) for one in found])
        return
    _show(found)


@app.command("set")
def set_(
    workspace: Annotated[str, typer.Option(metavar="NAME", help="The workspace's name.")],
    calls: Annotated[str | None, typer.Option(metavar="N|default", help="Calls a minute.")] = None,
    executions: Annotated[str | None, typer.Option(metavar="N|default", help="Executions a minute.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Set a workspace's limits; "default" is what the server's settings say.

    Servers go by it within a second, or 5 if the word of it is lost. The workspace's audit log records it.
    """
    import asyncio

    from relay_grpc.ratelimit.overrides import set_limits
    from relay_grpc.settings import MOST_CALLS, MOST_EXECUTIONS

    asked = (("calls", calls, MOST_CALLS), ("executions", executions, MOST_EXECUTIONS))
    limits = {budget: _limit(budget, text, most) for budget, text, most in asked if text is not None}
    if not limits:
        raise Failure("nothing to set: give --calls, --executions or both", code=ExitCode.USAGE)
    with database(data_dir) as url:
        changed = asyncio.run(set_limits(url, workspace, limits))
    if changed is None:
        raise _unknown(workspace)
    if as_json:
        show_json(_document(changed))
        return
    _show([changed])


def _limit(budget: str, text: str, most: int) -> int | None:
    if text == DEFAULT:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise Failure(f"--{budget}: {text!r} should be a number from 1 to {most}, or default", code=ExitCode.USAGE)
    return int(text)


def _unknown(workspace: str) -> Failure:
    return Failure(f"no workspace is named {workspace!r}; 'relay limits show' names them", code=ExitCode.NOT_FOUND)


def _document(one: "WorkspaceLimits") -> dict[str, Any]:
    return {
        "workspace": one.name,
        "workspaceId": str(one.workspace_id),
        "callsPerMinute": one.limits.calls,
        "executionsPerMinute": one.limits.executions,
    }


def _show(found: list["WorkspaceLimits"]) -> None:
    def cell(limit: int | None) -> str:
        return DEFAULT if limit is None else str(limit)

    rows = ((one.name, cell(one.limits.calls), cell(one.limits.executions)) for one in found)
    tell(listing(("WORKSPACE", "CALLS A MINUTE", "EXECUTIONS A MINUTE"), rows, none="No workspaces."))
