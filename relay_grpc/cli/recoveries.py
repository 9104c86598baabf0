"""The commands of `relay executions` that deliver a range of failed executions again."""

import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from relay_grpc.cli import values
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.output import console, fields, moment, show, tell

if TYPE_CHECKING:
    from relay.client import Relay
    from relay.v1 import actions_pb2

LOOK_EVERY = 1.0  # seconds

Id = Annotated[str, typer.Argument(metavar="ID", help="A recovery's id.")]


def recover(
    ctx: typer.Context,
    since: Annotated[
        datetime,
        typer.Option(
            parser=values.time,
            metavar="TIME",
            help="Made from this local time on, such as 2026-01-31T15:00, or from so long ago, such as 2h.",
        ),
    ],
    until: Annotated[
        datetime | None, typer.Option(parser=values.time, metavar="TIME", help="Made before this. Unset: now.")
    ] = None,
    connection: Annotated[str, typer.Option(metavar="ID", help="Only to this connection.")] = "",
    validate_only: Annotated[bool, typer.Option("--validate-only", metavar="", help="Only count.")] = False,
    yes: values.Yes = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show how far it is until it has ended.")] = True,
    as_json: Json = False,
) -> None:
    """Deliver again what failed in a range of time, each once: count, ask, and show how far it is."""
    if not validate_only:
        values.need_somebody(yes)
    with connected(ctx) as relay:
        found = relay.actions.recover_executions(since, end_time=until, connection_id=connection, validate_only=True)
        if validate_only or not found.total_count:
            show(found, _recovery, as_json=as_json)
            return
        values.need_consent(f"Deliver {found.total_count} failed executions again?", yes)
        begun = relay.actions.recover_executions(since, end_time=until, connection_id=connection)
        ended = _watched(relay, begun) if wait else begun
    show(ended, _recovery, as_json=as_json)


def recovery(ctx: typer.Context, recovery_id: Id, as_json: Json = False) -> None:
    """Show how far a recovery is."""
    with connected(ctx) as relay:
        found = relay.actions.get_recovery(recovery_id)
    show(found, _recovery, as_json=as_json)


def cancel_recovery(ctx: typer.Context, recovery_id: Id, as_json: Json = False) -> None:
    """Stop a recovery where it is. What it has handed over goes on."""
    with connected(ctx) as relay:
        stopped = relay.actions.cancel_recovery(recovery_id)
    show(stopped, _recovery, as_json=as_json)


def _watched(relay: "Relay", recovery: "actions_pb2.Recovery") -> "actions_pb2.Recovery":
    """The recovery once it has ended. Shows a bar on a terminal. Where the watch breaks off, it says how to go on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    stderr = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, console=stderr, transient=True, disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("Handed over", total=recovery.total_count)
            while not recovery.HasField("end_time"):
                time.sleep(LOOK_EVERY)
                recovery = relay.actions.get_recovery(recovery.id)
                progress.update(bar, completed=recovery.recovered_count, total=recovery.total_count)
    except BaseException:
        tell(f"It goes on: see 'relay executions recovery {recovery.id}', or cancel-recovery.", stderr=True)
        raise
    return recovery


def _recovery(recovery: "actions_pb2.Recovery") -> RenderableType:
    if not recovery.id:
        return f"{recovery.total_count} failed executions can be delivered again. Nothing was done."
    return fields(
        {
            "id": recovery.id,
            "state": _state(recovery),
            "handed over": f"{recovery.recovered_count} of {recovery.total_count}",
            "begun": moment(recovery, "create_time"),
            "ended": moment(recovery, "end_time"),
        }
    )


def _state(recovery: "actions_pb2.Recovery") -> str:
    if not recovery.HasField("end_time"):
        return "under way"
    return "cancelled" if recovery.cancelled else "ended"
