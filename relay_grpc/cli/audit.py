"""`relay audit`."""

from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from relay_grpc.audit.event import Outcome
from relay_grpc.cli import audit_files, values
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.output import listing, page_size, plain, show_newest, show_next, tell, when, word

if TYPE_CHECKING:
    from relay.v1 import audit_pb2

app = typer.Typer(help="Read the audit log, and prove what it holds.", no_args_is_help=True)
FOLLOWED_FOR = 30 * 86_400.0  # seconds


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


@app.command()
def tail(
    ctx: typer.Context,
    cursor: Annotated[
        str, typer.Option(metavar="CURSOR", help="Where an earlier one ended. Unset: what comes from now on.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Show events as they are added to the log, in its order. Ctrl-C ends it, and it tells how to go on.

    With --json, each is a document on a line of its own.
    """
    last = ""
    try:
        with connected(ctx) as relay:
            for answer in relay.audit.tail_events(cursor=cursor, timeout=FOLLOWED_FOR):
                if answer.HasField("event"):
                    show_next(answer, _line, as_json=as_json)
                last = answer.cursor
    except KeyboardInterrupt:
        raise typer.Exit from None
    finally:
        if last:
            tell(f"To go on after this: --cursor {last}", stderr=True)


for command in (
    audit_files.export,
    audit_files.verify,
    audit_files.checkpoint,
    audit_files.consistency,
    audit_files.inclusion,
):
    app.command()(command)


def _line(answer: "audit_pb2.TailEventsResponse") -> RenderableType:
    event = answer.event
    line = Text.assemble(when(event.event_time), "  ", word(event, "outcome"), "  ", _what(event, "  "))
    if answer.dropped_count:
        return Group(Text(f"{answer.dropped_count} events were dropped before this one"), line)
    return line


def _events(events: list["audit_pb2.Event"]) -> RenderableType:
    return listing(
        ("TIME", "OUTCOME", "WHAT"),
        ((when(event.event_time), word(event, "outcome"), _what(event)) for event in events),
        none="No events.",
    )


def _what(event: "audit_pb2.Event", between: str = "\n") -> Text:
    """What was done by whom on the first line, to what on the second."""
    what = plain(event.action) + " by " + (plain(event.actor.name) if event.actor.name else word(event.actor, "type"))
    if event.reason:
        what.append(": ").append(plain(event.reason))
    if event.count > 1:
        what.append(f" ({event.count} times)")
    if event.target:
        what.append(between).append(plain(event.target))
    return what
