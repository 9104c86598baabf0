"""`relay executions`."""

from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from relay_grpc.actions.execution import State
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.output import excerpt, fields, listing, moment, page_size, plain, show, show_newest, when, word

if TYPE_CHECKING:
    from relay.v1 import actions_pb2

app = typer.Typer(help="Look at what was executed.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="An execution's id.")]


@app.command()
def get(ctx: typer.Context, execution_id: Id, as_json: Json = False) -> None:
    """Show one execution and how far it is."""
    with connected(ctx) as relay:
        execution = relay.actions.get_execution(execution_id)
    show(execution, view, as_json=as_json)


@app.command("list")
def list_executions(
    ctx: typer.Context,
    state: Annotated[
        list[State] | None, typer.Option(metavar="STATE", help=f"Only {', '.join(State)}. Repeatable.")
    ] = None,
    action: Annotated[str, typer.Option(metavar="NAME", help="Only of this action.")] = "",
    connection: Annotated[str, typer.Option(metavar="ID", help="Only to this connection.")] = "",
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="How many at most.")] = 50,
    as_json: Json = False,
) -> None:
    """List the executions of the workspace, newest first."""
    from relay.v1 import actions_pb2

    states = [getattr(actions_pb2, f"EXECUTION_STATE_{one.name}") for one in state or ()]
    with connected(ctx) as relay:
        found = relay.actions.list_executions(
            states=states, action=action, connection_id=connection, page_size=page_size(limit)
        )
        newest = list(islice(found, limit + 1))
    show_newest(newest, limit, _executions, as_json=as_json)


@app.command()
def attempts(ctx: typer.Context, execution_id: Id, as_json: Json = False) -> None:
    """List the attempts of one execution, first to last."""
    with connected(ctx) as relay:
        found = list(relay.actions.list_attempts(execution_id))
    show(found, _attempts, as_json=as_json)


def view(execution: "actions_pb2.Execution") -> RenderableType:
    """One execution, for people."""
    last = execution.last_attempt
    return fields(
        {
            "id": execution.id,
            "state": word(execution, "state") + (" (this key was executed before)" if execution.replayed else ""),
            "action": f"{execution.action}, version {execution.action_version}",
            "connection": execution.connection_id,
            "preview": execution.preview_id,
            "idempotency key": execution.idempotency_key,
            "created": moment(execution, "create_time"),
            "attempts": str(execution.attempt_count),
            "last attempt": _ending(last) if execution.HasField("last_attempt") else "",
            "answer": excerpt(last.response_excerpt),
            "next attempt": moment(execution, "next_attempt_time"),
            "ended": moment(execution, "end_time"),
        }
    )


def _executions(executions: list["actions_pb2.Execution"]) -> RenderableType:
    return listing(
        ("ID", "STATE", "ACTION", "CREATED"),
        (
            (execution.id, word(execution, "state"), execution.action, when(execution.create_time))
            for execution in executions
        ),
        none="No executions.",
    )


def _attempts(attempts: list["actions_pb2.Attempt"]) -> RenderableType:
    return listing(
        ("N", "BEGUN", "TOOK", "OUTCOME", "ANSWER"),
        (
            (
                str(attempt.number),
                when(attempt.start_time),
                _took(attempt),
                _ending(attempt),
                excerpt(attempt.response_excerpt),
            )
            for attempt in attempts
        ),
        none="No attempts yet.",
    )


def _ending(attempt: "actions_pb2.Attempt") -> Text:
    ending = word(attempt, "outcome")
    if attempt.status_code:
        ending.append(f", HTTP {attempt.status_code}")
    if attempt.error:
        ending.append(": ").append(plain(attempt.error))
    return ending


def _took(attempt: "actions_pb2.Attempt") -> str:
    milliseconds = attempt.duration.ToMilliseconds()
    return f"{milliseconds} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"
