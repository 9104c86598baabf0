"""`relay audit export`, `verify`, `checkpoint`, `consistency` and `inclusion`: what of the log is kept elsewhere."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer
from rich.console import Group

from relay_grpc.cli import values
from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.output import console, plain, show, show_json, tell

if TYPE_CHECKING:
    from relay.proofs import Report

STDOUT = Path("-")
MIB = 1 << 20


class Format(StrEnum):
    """relay.v1.ExportFormat."""

    JSONL = "jsonl"
    CSV = "csv"
    OCSF = "ocsf"


def export(
    ctx: typer.Context,
    export_format: Annotated[Format, typer.Option("--format", help="jsonl alone can be verified.")] = Format.JSONL,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=values.time, metavar="TIME", help="Logged from this time on, or from so long ago, such as 7d."
        ),
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(parser=values.time, metavar="TIME", help="Logged before this.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; - for standard output, as in a pipe.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace the file if there is one.")] = False,
) -> None:
    """Write the events of the log to a file that only you can read. It is there when it is whole."""
    from relay.errors import RelayError
    from relay.v1 import audit_pb2

    if output is None and sys.stdout.isatty():
        raise Failure("where to? give --output FILE, or --output - for the terminal", code=ExitCode.USAGE)
    if output not in (None, STDOUT) and output.exists() and not force:
        raise Failure(f"{output} is there already; --force replaces it", code=ExitCode.REFUSED)
    wanted = getattr(audit_pb2, f"EXPORT_FORMAT_{export_format.name}")
    written = 0
    with connected(ctx) as relay, _whole(output or STDOUT) as file, console(stderr=True).status("") as status:
        try:
            for answer in relay.audit.export_events(wanted, start_time=since, end_time=until):
                written += file.write(answer.chunk)
                status.update(f"{written / MIB:.1f} MiB")
        except RelayError as error:
            if output in (None, STDOUT):
                error.add_note("what was written is not whole")
            raise
    if output not in (None, STDOUT):
        tell(f"{output}: {written / MIB:.1f} MiB", stderr=True)


@contextmanager
def _whole(output: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block has ended well, on the disk, and readable for its owner alone."""
    if output == STDOUT:
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise Failure(f"can't write to {output.parent}: {error.strerror}", code=ExitCode.USAGE) from error
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(name, output)
    except OSError as error:
        raise Failure(f"can't write {output}: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An export in jsonl; - for standard input.")],
    key: Annotated[
        list[str],
        typer.Option(metavar="VKEY", help="The public key: your operator's 'relay audit keys' prints it. Repeatable."),
    ],
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A checkpoint that was kept: the log has to continue it. Repeatable."),
    ] = None,
    consistency: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What 'relay audit consistency' printed, if it is asked for. Repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove, asking no server, that an export is what the log had, and say what it does not prove."""
    from relay.proofs import ProofError, verify_file

    try:
        report = verify_file(file, key, checkpoint or (), consistency or ())
    except ProofError as error:
        raise Failure(f"not proven: {error}") from error
    except OSError as error:
        raise Failure(f"can't read {error.filename or file}: {error.strerror}", code=ExitCode.USAGE) from error
    if as_json:
        show_json(_document(report))
    else:
        tell(Group(*map(plain, report.lines())))
    if report.unexplained:
        raise typer.Exit(ExitCode.FAILED)


def _document(report: "Report") -> dict[str, object]:
    return {
        "origin": report.checkpoint.origin,
        "treeSize": report.checkpoint.size,
        "signers": list(report.checkpoint.signers),
        "first": report.first,
        "end": report.end,
        "firstKept": report.first_kept,
        "continues": list(report.older),
        "erasedValues": report.erased_values,
        "erasedEvents": report.erased_events,
        "unexplainedEvents": report.unexplained,
        "proven": list(report.proven()),
        "notProven": list(report.unproven()),
    }


def checkpoint(ctx: typer.Context, as_json: Json = False) -> None:
    """Print the newest signed checkpoint. Kept where nobody of this server comes, it proves later what was there."""
    with connected(ctx) as relay:
        newest = relay.audit.get_checkpoint()
    if as_json:
        show(newest, lambda one: one.note, as_json=True)
    else:
        typer.echo(newest.note, nl=False)


def consistency(
    ctx: typer.Context,
    first: Annotated[int, typer.Argument(min=0, metavar="FIRST", help="The size of an older checkpoint.")],
    second: Annotated[int, typer.Argument(min=0, metavar="SECOND", help="The size of a newer one; 0 for the newest.")],
) -> None:
    """Print the proof, as JSON, that the log of one size goes on in that of another. 'verify' says when it needs it."""
    with connected(ctx) as relay:
        proof = relay.audit.get_consistency_proof(first, second_tree_size=second)
    show(proof, repr, as_json=True)


def inclusion(
    ctx: typer.Context,
    event_id: Annotated[str, typer.Argument(metavar="EVENT", help="An event's id.")],
    size: Annotated[int, typer.Option(min=0, metavar="SIZE", help="Of the checkpoint; 0 for the newest.")] = 0,
) -> None:
    """Print the proof, as JSON, that one event is in the log, to be given to somebody without all the others."""
    with connected(ctx) as relay:
        proof = relay.audit.get_inclusion_proof(event_id, tree_size=size)
    show(proof, repr, as_json=True)
