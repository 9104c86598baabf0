"""`relay audit`."""

from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from relay_grpc.audit.event import Outcome
from relay_grpc.cli import values
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.output import listing, page_size, plain, show_newest, when, word

if TYPE_CHECKING:
    from relay.v1 import audit_pb2

app = typer.Typer(help="Read the audit log.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Keeps `list` a command of its own: Typer makes a lone one the group itself."""


@app.command("list")
def list_events(
    ctx: typer.Context,
    action: Annotated[
        str,
        typer.Option(metavar="NAME", help="Only this, such as ActionsService.Execute."),
    ] = "",
    provider: Annotated[str, typer.Option(metavar="NAME", help="Only about this provider.")] = "",
    outcome: Annotated[Outcome | None, typer.Option(help="Only what ended like this.")] = None,
    actor: Annotated[str, typer.Option(metavar="ID", help="Only by this key or user.")] = "",
    request_id: Annotated[str, typer.Option(metavar="ID", help="Only of this call.")] = "",
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=values.time,
            metavar="TIME",
            help="From this local time on, such as 2026-01-31T15:00, or from so long ago, such as 2h.",
        ),
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(parser=values.time, metavar="TIME", help="Before this, written as for --since.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="How many at most.")] = 50,
    as_json: Json = False,
) -> None:
    """List the events of the workspace, newest first."""
    from relay.v1 import audit_pb2

    with connected(ctx) as relay:
        events = relay.audit.list_events(
            action=action,
            provider=provider,
            outcome=getattr(audit_pb2, f"EVENT_OUTCOME_{outcome.name if outcome else 'UNSPECIFIED'}"),
            actor_id=actor,
            request_id=request_id,
            start_time=since,
            end_time=until,
            page_size=page_size(limit),
        )
        newest = list(islice(events, limit + 1))
    show_newest(newest, limit, _events, as_json=as_json)


def _events(events: list["audit_pb2.Event"]) -> RenderableType:
    return listing(
        ("TIME", "OUTCOME", "WHAT"),
        ((when(event.event_time), word(event, "outcome"), _what(event)) for event in events),
        none="No events.",
    )


def _what(event: "audit_pb2.Event") -> Text:
    """What was done by whom on the first line, to what on the second."""
    what = plain(event.action) + " by " + (plain(event.actor.name) if event.actor.name else word(event.actor, "type"))
    if event.reason:
        what.append(": ").append(plain(event.reason))
    if event.count > 1:
        what.append(f" ({event.count} times)")
    if event.target:
        what.append("\n").append(plain(event.target))
    return what
