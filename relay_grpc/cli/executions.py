"""`relay executions`."""

from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import RenderableType
from rich.text import Text

from relay_grpc.actions.execution import State
from relay_grpc.cli import recoveries
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.failures import ExitCode
from relay_grpc.cli.output import (
    excerpt,
    fields,
    length,
    listing,
    moment,
    page_size,
    plain,
    show,
    show_newest,
    show_next,
    when,
    word,
)

if TYPE_CHECKING:
    from relay.v1 import actions_pb2

app = typer.Typer(help="Look at what was executed, watch, cancel, resend and recover it.", no_args_is_help=True)

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


@app.command()
def watch(ctx: typer.Context, execution_id: Id, as_json: Json = False) -> None:
    """Show an execution as it is and after each change, until it ends or its outcome is unknown.

    With --json, each is a document on a line of its own.
    """
    from relay.v1.actions_pb2 import EXECUTION_STATE_UNKNOWN

    with connected(ctx) as relay:
        for execution in relay.actions.watch_execution(execution_id):
            show_next(execution, _change, as_json=as_json)
            if execution.state == EXECUTION_STATE_UNKNOWN:
                break  # nothing but a person settles it
    end_with(execution)


@app.command()
def cancel(ctx: typer.Context, execution_id: Id, as_json: Json = False) -> None:
    """Stop further attempts of an execution. One that is under way goes on, and may yet succeed."""
    with connected(ctx) as relay:
        execution = relay.actions.cancel_execution(execution_id)
    show(execution, view, as_json=as_json)


@app.command()
def resend(ctx: typer.Context, execution_id: Id, as_json: Json = False) -> None:
    """Deliver an ended execution once more, under the same webhook-id and with all its attempts anew."""
    with connected(ctx) as relay:
        from relay.errors import DeadlineExceeded, Unavailable

        try:
            execution = relay.actions.resend_execution(execution_id)
        except (DeadlineExceeded, Unavailable) as error:
            error.add_note(f"whether it is sent again is not known: 'relay executions get {execution_id}' tells")
            raise
    show(execution, view, as_json=as_json)


@app.command()
def reconcile(
    ctx: typer.Context,
    execution_id: Id,
    state: Annotated[Literal["success", "failed"], typer.Option(help="What happened.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="How that is known; kept in the audit log.")],
    as_json: Json = False,
) -> None:
    """Settle an execution whose outcome is unknown."""
    from relay.v1 import actions_pb2

    settled = getattr(actions_pb2, f"EXECUTION_STATE_{state.upper()}")
    with connected(ctx) as relay:
        execution = relay.actions.reconcile_execution(execution_id, settled, reason)
    show(execution, view, as_json=as_json)


for command in (recoveries.recover, recoveries.recovery, recoveries.cancel_recovery):
    app.command()(command)


def end_with(execution: "actions_pb2.Execution") -> None:
    """Ends the command with 1 where the execution ended otherwise than in success, or nobody knows how."""
    from relay.v1.actions_pb2 import EXECUTION_STATE_CANCELLED, EXECUTION_STATE_FAILED, EXECUTION_STATE_UNKNOWN

    if execution.state in (EXECUTION_STATE_FAILED, EXECUTION_STATE_CANCELLED, EXECUTION_STATE_UNKNOWN):
        raise typer.Exit(ExitCode.FAILED)


def view(execution: "actions_pb2.Execution") -> RenderableType:
    """One execution, for people."""
    last = execution.last_attempt
    return fields(
        {
            "id": execution.id,
            "state": word(execution, "state").append(_remark(execution)),
            "action": f"{execution.action}, version {execution.action_version}",
            "connection": execution.connection_id,
            "preview": execution.preview_id,
            "idempotency key": execution.idempotency_key,
            "created": moment(execution, "create_time"),
            "delivery": word(execution, "delivery"),
            "attempts": str(execution.attempt_count),
            "sent anew": _times(execution.resend_count),
            "last attempt": _ending(last) if execution.HasField("last_attempt") else "",
            "answer": excerpt(last.response_excerpt),
            "next attempt": moment(execution, "next_attempt_time"),
            "ended": moment(execution, "end_time"),
        }
    )


def _remark(execution: "actions_pb2.Execution") -> str:
    if execution.replayed:
        return " (this key was executed before)"
    return " (there will be no other attempt)" if execution.cancel_requested else ""


def _times(count: int) -> str:
    return {0: "", 1: "once"}.get(count, f"{count} times")


def _change(execution: "actions_pb2.Execution") -> RenderableType:
    """One line of a watch: when it came, the state, how the last attempt ended, and when the next one is due."""
    line = Text(f"{datetime.now():%H:%M:%S}  ").append(word(execution, "state")).append(_remark(execution))
    last = execution.last_attempt
    if last.number < execution.attempt_count:
        line.append(f"  attempt {execution.attempt_count}")
    elif execution.HasField("last_attempt"):
        line.append(f"  attempt {last.number} ").append(_ending(last))
    if execution.HasField("next_attempt_time"):
        line.append(f", next at {when(execution.next_attempt_time)}")
    return line


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
                length(attempt.duration),
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
