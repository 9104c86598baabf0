"""`relay actions`."""

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from relay_grpc.cli import executions, values
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.output import fields, length, listing, moment, plain, show, tell, word

if TYPE_CHECKING:
    from relay.client import Relay
    from relay.v1 import actions_pb2

app = typer.Typer(help="Preview actions, and execute what was previewed.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="ACTION", help="An action's name, such as webhook.send.")]
Parameters = Annotated[
    dict[str, Any],
    typer.Option(
        parser=values.parameters,
        metavar="JSON",
        help="What the action's schema asks for: a JSON object, @FILE, or - for standard input.",
    ),
]
Connection = Annotated[str, typer.Option(metavar="ID", help="Where it goes. Unset: the default connection.")]
Key = Annotated[
    str,
    typer.Option(
        "--idempotency-key",
        metavar="KEY",
        help="1 to 255 characters: what is repeated under the same key is done once. Unset: the preview's id.",
    ),
]
Wait = Annotated[
    timedelta | None,
    typer.Option(
        parser=values.duration,
        metavar="DURATION",
        help="How long to wait for the first attempt's end, 0s to 30s. Unset: 10s.",
    ),
]
DEADLINE = 30.0  # seconds beside the wait, as in relay.client


@app.command("list")
def list_actions(ctx: typer.Context, as_json: Json = False) -> None:
    """List the actions of the server; their schemas are in the JSON."""
    with connected(ctx) as relay:
        found = list(relay.actions.list())
    show(found, _actions, as_json=as_json)


@app.command()
def preview(
    ctx: typer.Context,
    action: Name,
    parameters: Parameters,
    connection: Connection = "",
    ttl: Annotated[
        timedelta | None,
        typer.Option(
            parser=values.duration, metavar="DURATION", help="How long it can be executed, 10s to 24h. Unset: 1h."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an action would do, without doing it."""
    with connected(ctx) as relay:
        made = relay.actions.preview(action, parameters, connection_id=connection, ttl=ttl)
    show(made, _plan, as_json=as_json)


@app.command()
def execute(
    ctx: typer.Context,
    preview_id: Annotated[str, typer.Argument(metavar="PREVIEW_ID", help="A preview's id.")],
    idempotency_key: Key = "",
    wait: Wait = None,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", metavar="", help="Check everything, do nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Do what a preview showed, once, and print how it went."""
    with connected(ctx) as relay:
        execution = _execute(relay, preview_id, "", idempotency_key, wait, validate_only=validate_only)
    _conclude(execution, as_json)
    if validate_only and not execution.id:
        tell("It could be executed. Nothing was done.", stderr=True)


@app.command()
def run(
    ctx: typer.Context,
    action: Name,
    parameters: Parameters,
    connection: Connection = "",
    idempotency_key: Key = "",
    wait: Wait = None,
    yes: values.Yes = False,
    as_json: Json = False,
) -> None:
    """Preview an action, ask, execute it and print how it went."""
    values.need_somebody(yes)
    with connected(ctx) as relay:
        shown = relay.actions.preview(action, parameters, connection_id=connection)
        tell(_plan(shown), "", stderr=True)
        values.need_consent("Execute it?", yes)
        execution = _execute(relay, shown.id, shown.digest, idempotency_key, wait)
    _conclude(execution, as_json)


def _execute(
    relay: "Relay", preview_id: str, digest: str, key: str, wait: timedelta | None, *, validate_only: bool = False
) -> "actions_pb2.Execution":
    from relay.errors import DeadlineExceeded, Unavailable
    from relay.v1.actions_pb2 import ExecuteRequest

    request = ExecuteRequest(
        preview_id=preview_id, digest=digest, idempotency_key=key, wait=wait, validate_only=validate_only
    )
    try:
        answer: actions_pb2.Execution = relay.actions.call(
            "Execute", request, timeout=DEADLINE + (wait.total_seconds() if wait else 0)
        )
    except (DeadlineExceeded, Unavailable) as error:
        again = f"relay actions execute {preview_id}" + (f" --idempotency-key {key}" if key else "")
        error.add_note(f"whether it was done is not known: '{again}' tells, and does not do it twice")
        raise
    return answer


def _conclude(execution: "actions_pb2.Execution", as_json: bool) -> None:
    show(execution, executions.view, as_json=as_json)
    executions.end_with(execution)


def _actions(actions: list["actions_pb2.Action"]) -> RenderableType:
    return listing(
        ("NAME", "VERSION", "DELIVERY", "DESCRIPTION"),
        ((action.name, str(action.version), word(action, "delivery"), _description(action)) for action in actions),
        none="No actions.",
    )


def _description(action: "actions_pb2.Action") -> Text:
    description = plain(action.description)
    if not action.enabled:
        description.append(" Disabled: ", "red").append(plain(action.disabled_reason))
    return description


def _plan(preview: "actions_pb2.Preview") -> RenderableType:
    plan = preview.delivery_plan
    return fields(
        {
            "preview": preview.id,
            "what": preview.summary,
            "addresses": ", ".join(plan.addresses) or "its name does not resolve now",
            "signed": ", ".join(plan.signatures),
            "delivery": word(plan, "delivery").append(
                f", {plan.max_attempts} {'attempt' if plan.max_attempts == 1 else 'attempts'}"
                f" of {length(plan.timeout)} at most"
            ),
            "retries": "after " + ", ".join(map(length, plan.retry_delays)) if plan.retry_delays else "",
            "breaker": word(plan, "breaker_state"),
            "costs": f"{plan.quota_cost} of the executions budget",
            "digest": preview.digest,
            "expires": moment(preview, "expire_time"),
            "warning": Text("\n").join(Text(plain(warning).plain, "yellow") for warning in preview.warnings),
        }
    )
