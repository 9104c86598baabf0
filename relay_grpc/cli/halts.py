"""`relay halt`, `relay resume`, `relay halts`: the operator's kill switch, on the database itself."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay_grpc.cli.client import Json
from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.operator import database
from relay_grpc.cli.output import listing, show_json, tell
from relay_grpc.cli.server import DataDir

if TYPE_CHECKING:
    from relay_grpc.halts import Halt

MOST_REASON = 256  # characters

Workspace = Annotated[
    str | None, typer.Option(metavar="NAME", help="What goes out for this workspace alone. Unset: for all.")
]
Provider = Annotated[
    str,
    typer.Option(metavar="NAME", help='What goes out by this provider alone, such as "independent". Unset: by any.'),
]


def halt(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="What callers are told, and the audit log keeps.")],
    workspace: Workspace = None,
    provider: Provider = "",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Stop previewing and sending, at once: of everything, of a workspace, of a provider.

    What was accepted before waits for 'relay resume'; attempts under way end. The audit log records it.
    """
    import asyncio

    from relay_grpc import halts
    from relay_grpc.actions.catalogue import CATALOGUE
    from relay_grpc.owner import UnknownWorkspace

    if not 1 <= len(reason.strip()) <= MOST_REASON:
        raise Failure(f"--reason: should have 1 to {MOST_REASON} characters", code=ExitCode.USAGE)
    known = sorted({action.provider for action in CATALOGUE})
    if provider and provider not in known:
        raise Failure(f"no provider is named {provider!r}; there is {', '.join(known)}", code=ExitCode.NOT_FOUND)
    with database(data_dir) as url:
        try:
            held = asyncio.run(halts.halt(url, workspace, provider, reason.strip()))
        except UnknownWorkspace:
            raise _unknown(workspace) from None
    _show(held, as_json=as_json)


def resume(
    workspace: Workspace = None, provider: Provider = "", data_dir: DataDir = None, as_json: Json = False
) -> None:
    """Lift a halt: the one of the same workspace and provider. What waited goes on.

    Shows the halts that still hold. The audit log records it.
    """
    import asyncio

    from relay_grpc import halts
    from relay_grpc.owner import UnknownWorkspace

    with database(data_dir) as url:
        try:
            lifted, held = asyncio.run(halts.resume(url, workspace, provider))
        except UnknownWorkspace:
            raise _unknown(workspace) from None
    if not lifted:
        tell("Nothing was halted by exactly this.", stderr=True)
    _show(held, as_json=as_json)


def halts(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show what is halted."""
    import asyncio

    from relay_grpc import halts

    with database(data_dir) as url:
        held = asyncio.run(halts.halts(url))
    _show(held, as_json=as_json)


def _unknown(workspace: str | None) -> Failure:
    return Failure(f"no workspace is named {workspace!r}; 'relay limits show' names them", code=ExitCode.NOT_FOUND)


def _show(held: "list[Halt]", *, as_json: bool) -> None:
    if as_json:
        show_json([_document(one) for one in held])
        return
    rows = (
        (one.workspace or "all", one.provider or "all", one.since.astimezone().isoformat(" ", "seconds"), one.reason)
        for one in held
    )
    tell(listing(("WORKSPACE", "PROVIDER", "SINCE", "REASON"), rows, none="Nothing is halted."))


def _document(one: "Halt") -> dict[str, Any]:
    return {
        "workspace": one.workspace or "",
        "provider": one.provider,
        "reason": one.reason,
        "createTime": one.since.isoformat(),
    }
