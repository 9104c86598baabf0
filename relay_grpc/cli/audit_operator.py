"""`relay audit erase`, `drop` and `keys`: what the operator does with audit logs, on the database itself."""

import re
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from relay_grpc.cli import values
from relay_grpc.cli.client import Json
from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.operator import database
from relay_grpc.cli.output import console, listing, show_json, tell
from relay_grpc.cli.server import DataDir

if TYPE_CHECKING:
    from relay_grpc.audit import erasure
    from relay_grpc.audit.retention import Dropped

MOST_REASON = 256  # characters
ERASED = {
    "ACTOR": "of what they did: the actor, their name, the address, and their words",
    "ABOUT_ACTOR": "of what was done to their role: who they are, the parameters, and the words",
    "EVENTS": "of these events: everything that can be erased",
}


def erase(
    workspace: Annotated[
        str, typer.Option(metavar="NAME", help='Whose log; "system" is that of unknown callers\' refusals.')
    ],
    actor: Annotated[
        str, typer.Option(metavar="ID", help="What says who this was: a key's id, or a user as ISSUER#USER.")
    ] = "",
    event: Annotated[
        list[UUID] | None, typer.Option(metavar="ID", help="All that can be erased of this event. Several: repeat it.")
    ] = None,
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="What the audit log keeps, such as a case number. Not whom it is about.")
    ] = "",
    yes: values.Yes = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Erase personal data from a workspace's audit log. It can't be undone; every proof still verifies.

    First it tells what it found, and who exported or followed the log and so may hold copies.
    """
    import asyncio

    from relay_grpc.audit import erasure
    from relay_grpc.owner import UnknownWorkspace

    if bool(actor) == bool(event):
        raise Failure("give --actor, or one --event or more", code=ExitCode.USAGE)
    if len(reason) > MOST_REASON:
        raise Failure(f"--reason: should have {MOST_REASON} characters at most", code=ExitCode.USAGE)
    values.need_somebody(yes)
    request = erasure.Request(workspace, actor, event or ())
    with database(data_dir) as url:
        try:
            found = asyncio.run(erasure.look(url, request))
            done = _erase(url, request, reason.strip(), found, yes=yes)
        except UnknownWorkspace:
            raise Failure(
                f"no workspace is named {workspace!r}; 'relay limits show' names them", code=ExitCode.NOT_FOUND
            ) from None
    if as_json:
        show_json({"erased": dict(done), "copies": [_copy(row) for row in found.copies]})
    elif done:
        tell(f"Erased from {sum(done.values())} events. docs/audit.md says where copies can be left, and how long.")
    else:
        tell("There is nothing of it to erase, or it was erased before.")


def _erase(url: str, request: "erasure.Request", note: str, found: "erasure.Found", *, yes: bool) -> Any:
    import asyncio

    from relay_grpc.audit import erasure

    for part, count in found.counts.items():
        tell(f"{count} events: {ERASED[part]}", stderr=True)
    if found.copies:
        copies = (tuple(_copy(row).values()) for row in found.copies)
        tell("These may have copies of them:", listing(("TIME", "HOW", "WHO"), copies, none=""), stderr=True)
    if found.counts:  # else there may be what a run that broke off left to Postgres
        values.need_consent("Erase it for good?", yes)
    with console(stderr=True).status("") as status:
        return asyncio.run(erasure.erase(url, request, note, lambda count: status.update(f"{count} done")))


def _copy(row: Any) -> dict[str, str]:
    return {
        "time": row["created_at"].astimezone().isoformat(" ", "seconds"),
        "action": row["action"],
        "actor": row["actor_id"] or "erased",
    }


def drop(
    before: Annotated[
        str,
        typer.Option(metavar="YYYY-MM", help="The first month to keep, in UTC; the three before this one at least."),
    ],
    yes: values.Yes = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Drop the audit events of all workspaces before a month. It can't be undone.

    Proofs of what is kept still verify. Each workspace's log has an event of it, and exports begin after what is gone.
    """
    import asyncio

    from relay_grpc.audit import retention

    month = _month(before)
    values.need_somebody(yes)
    with database(data_dir) as url:
        try:
            found = asyncio.run(retention.look(url, month))
            if found.months:
                _tell_losses(found)
                values.need_consent("Drop them for good?", yes)
                found = asyncio.run(retention.drop(url, month))
        except retention.Refused as error:
            raise Failure(str(error), code=ExitCode.REFUSED) from error
    if as_json:
        losses = [
            {"workspace": loss.workspace, "events": loss.events, "firstKept": loss.first_kept} for loss in found.losses
        ]
        show_json({"months": list(found.months), "bytes": found.size, "workspaces": losses})
    elif found.months:
        tell(f"Dropped {found.months[0]} to {found.months[-1]}, {found.size / 2**20:.1f} MiB.")
    else:
        tell(f"There is nothing before {before}.")


def _month(text: str) -> date:
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", text):
        raise Failure(f"--before: {text!r} should be a month, such as 2026-01", code=ExitCode.USAGE)
    return date.fromisoformat(f"{text}-01")


def _tell_losses(found: "Dropped") -> None:
    rows = ((loss.workspace, str(loss.events), str(loss.first_kept)) for loss in found.losses)
    tell(
        f"{found.months[0]} to {found.months[-1]}, {found.size / 2**20:.1f} MiB on disk:",
        listing(("WORKSPACE", "EVENTS", "FIRST LEAF THAT IS KEPT"), rows, none="No events."),
        stderr=True,
    )


def keys(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Print the public keys of RELAY_AUDIT_KEYS, or of the data folder, which verify checkpoints: one a line."""
    from relay_grpc.audit.checkpoint import Signer
    from relay_grpc.datafolder import KEY_MATERIAL, DataFolderError, with_key_material

    # As in development: it needs these keys, and nothing else that production serves with.
    settings = values.settings_from(data_dir=data_dir, env="development")
    if not settings.audit_keys:
        if not (settings.data_dir / KEY_MATERIAL).exists():
            raise Failure(
                f"no RELAY_AUDIT_KEYS, and no {settings.data_dir / KEY_MATERIAL}: 'relay serve' makes it",
                code=ExitCode.USAGE,
            )
        try:
            settings = with_key_material(settings)
        except DataFolderError as error:
            raise Failure(str(error)) from error
    public = Signer({key.id: key.key for key in settings.audit_keys}).verifier_keys
    if as_json:
        show_json(public)
        return
    for key in public:
        typer.echo(key)
