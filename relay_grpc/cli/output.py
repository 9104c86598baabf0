"""What commands print: tables and fields for people, JSON for scripts. Nothing else goes to standard output."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

UUID_LENGTH = 36
EXCERPT_LENGTH = 200

# By the word for an enum's value.
_STYLES = {
    "success": "green",
    "pending": "yellow",
    "executing": "cyan",
    "unknown": "magenta",
    "cancelled": "dim",
    "failed": "red",
    "denied": "red",
    "refused": "red",
    "timeout": "red",
    "unreachable": "red",
    "egress_refused": "red",
    "interrupted": "red",
    "unsendable": "red",
    "valid": "green",
    "not_found": "red",
    "revoked": "red",
    "expired": "red",
    "insufficient_scopes": "yellow",
    "closed": "green",
    "open": "red",
    "half_open": "yellow",
}


def show(answer: "Message | Sequence[Message]", view: Callable[[Any], RenderableType], *, as_json: bool) -> None:
    """Prints messages of the API: as protobuf's JSON, lists as an array, or as `view` makes it for people."""
    if as_json:
        from google.protobuf.message import Message

        show_json(_document(answer) if isinstance(answer, Message) else [_document(message) for message in answer])
    else:
        tell(view(answer))


def show_next(message: "Message", view: Callable[[Any], RenderableType], *, as_json: bool) -> None:
    """Prints one of many messages at once: its JSON on a line of its own, or as `view` makes it for people."""
    if as_json:
        typer.echo(json.dumps(_document(message)))
        sys.stdout.flush()  # whoever reads it through a pipe waits for it
    else:
        tell(view(message))


def _document(message: "Message") -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, always_print_fields_with_no_presence=True)


def show_json(document: object) -> None:
    """Prints one JSON document. It is ASCII, so that a terminal takes nothing in it for a command."""
    typer.echo(json.dumps(document, indent=2))


def tell(*renderables: RenderableType, stderr: bool = False) -> None:
    """Prints for people: in colour on a terminal, plain elsewhere and with NO_COLOR."""
    console(stderr=stderr).print(*renderables)


def console(*, stderr: bool = False) -> Console:
    """Standard output or error. Rich alone would keep bold and dim with NO_COLOR."""
    coloured = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not coloured.no_color:
        return coloured
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, color_system=None)


def tell_secrets(secrets: Mapping[str, str]) -> None:
    """Prints secrets by name, each on one line however long it is, so that it can be copied."""
    typer.echo("\n" + "\n".join(f"{name}: {secret}" for name, secret in secrets.items()))
    typer.echo("Shown this once: keep it now.")


def show_newest(
    newest: "Sequence[Message]", limit: int, view: Callable[[Any], RenderableType], *, as_json: bool
) -> None:
    """Shows the first `limit` messages, and says on standard error where there is one more."""
    show(newest[:limit], view, as_json=as_json)
    if len(newest) > limit:
        tell(f"These are the newest {limit}; --limit shows more.", stderr=True)


def page_size(limit: int) -> int:
    """What to ask of a list for `limit` items and one more; 200 is the server's most."""
    return min(limit + 1, 200)


def listing(headings: Sequence[str], rows: Iterable[Sequence[str | Text]], *, none: str) -> RenderableType:
    """A table that folds what does not fit, but never an id. none: what to say where there are no rows."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in headings:
        if heading == "ID":
            table.add_column(heading, min_width=UUID_LENGTH, no_wrap=True)
        elif heading == "USER":  # often a UUID too
            table.add_column(heading, min_width=UUID_LENGTH, overflow="fold")
        else:
            table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else plain(cell) for cell in row))
    return table if table.row_count else Text(none)


def fields(values: Mapping[str, str | Text]) -> Table:
    """Names and values below each other; empty values are left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if value:
            table.add_row(name, value if isinstance(value, Text) else plain(value))
    return table


def plain(text: str) -> Text:
    """Text from elsewhere: on one line, and with nothing in it that steers a terminal."""
    one_line = " ".join(text.split())
    return Text("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in one_line))


def excerpt(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= EXCERPT_LENGTH else text[:EXCERPT_LENGTH] + "..."


def word(message: "Message", field: str) -> Text:
    """The value of an enum field as a word: "success" for EXECUTION_STATE_SUCCESS."""
    enum: Any = message.DESCRIPTOR.fields_by_name[field].enum_type
    number = getattr(message, field)
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    known = enum.values_by_number.get(number)  # a newer server may know more values
    name = known.name.removeprefix(prefix).lower() if known else str(number)
    return Text.assemble((name.replace("_", " "), _STYLES.get(name, "")))  # what is appended keeps its own style


def when(timestamp: "Timestamp", *, now: datetime | None = None) -> str:
    """A local time, as short as it can be told: 15:22:07 today, Nov 23 15:22 this year, else 2025-11-23."""
    local = timestamp.ToDatetime(tzinfo=UTC).astimezone()
    today = now or datetime.now().astimezone()
    if local.date() == today.date():
        return f"{local:%H:%M:%S}"
    return f"{local:%b %d %H:%M}" if local.year == today.year else f"{local:%Y-%m-%d}"


def length(duration: "Duration") -> str:
    """A time span, in the largest unit that tells it whole: 250 ms, 1.5 s, 30 min, 10 h."""
    milliseconds = duration.ToMilliseconds()
    if 0 < milliseconds < 1000:
        return f"{milliseconds} ms"
    for unit, size in (("h", 3_600_000), ("min", 60_000)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size} {unit}"
    return f"{milliseconds / 1000:g} s"


def moment(message: "Message", field: str) -> str:
    """The local time in a timestamp field, to the second; "" where it is unset."""
    if not message.HasField(field):
        return ""
    return f"{getattr(message, field).ToDatetime(tzinfo=UTC).astimezone():%Y-%m-%d %H:%M:%S %z}"
