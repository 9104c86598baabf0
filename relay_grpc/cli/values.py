"""What people type: durations, times, JSON, consent, settings. What is wrong raises typer.BadParameter or Failure."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.output import tell

if TYPE_CHECKING:
    from relay_grpc.settings import Settings

Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do it without asking.")]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_LONGEST = timedelta(days=36_500)
_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def duration(text: str) -> timedelta:
    """A number and a unit, such as 500ms, 10s, 5m, 1h or 30d."""
    match = _DURATION.fullmatch(text)
    try:
        length = timedelta(**{_UNITS[match[2]]: float(match[1])}) if match else None
    except OverflowError:
        length = None
    if length is None or length > _LONGEST:
        raise typer.BadParameter(f"{text!r} should be a number with ms, s, m, h or d, such as 10s; 36500d at most")
    return length


def durations(text: str) -> list[timedelta]:
    """Several of them, by comma; "none" for none."""
    return [] if text == "none" else [duration(part.strip()) for part in text.split(",")]


def time(text: str) -> datetime:
    """A time in ISO 8601, local where it names no zone, or how long ago it was, such as 2h."""
    if _DURATION.fullmatch(text):
        return datetime.now(UTC) - duration(text)
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} should be a time such as 2026-01-31T15:00, or how long ago, such as 2h or 7d"
        ) from None


def parameters(text: str) -> dict[str, Any]:
    """A JSON object: itself, @FILE, or - for standard input."""
    source = _source(text)
    try:
        value = json.loads(source, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error.msg}, line {error.lineno} column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not what the API takes: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter("should be a JSON object, such as '{\"payload\": {}}'")
    return value


def headers(text: str) -> dict[str, str]:
    """A JSON object of texts: itself, @FILE, or - for standard input."""
    value = parameters(text)
    if not all(isinstance(one, str) for one in value.values()):
        raise typer.BadParameter('every value should be a text, such as \'{"Authorization": "Bearer ..."}\'')
    return value


def secret(text: str) -> str:
    """A secret: itself, @FILE, or - for standard input; an argument stays in the shell's history."""
    return _source(text).strip()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _source(text: str) -> str:
    try:
        if text == "-":
            return sys.stdin.read()
        if text.startswith("@"):
            return Path(text[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"can't read {text[1:]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter("what it names is not UTF-8 text") from None
    return text


def need_somebody(yes: bool) -> None:
    """Raises Failure where consent is not given and nobody is there to ask for it."""
    if not (yes or sys.stdin.isatty()):
        raise Failure("there is nobody to ask: give --yes to do it without asking", code=ExitCode.USAGE)


def need_consent(question: str, yes: bool) -> None:
    """Asks, unless consent is given; ends the command where it is refused."""
    if not (yes or typer.confirm(question, err=True)):
        tell("Nothing was done.", stderr=True)
        raise typer.Exit(ExitCode.FAILED)


def settings_from(**overrides: Any) -> "Settings":
    """The settings of the environment; overrides go by field name and win."""
    from relay_grpc import failpoints
    from relay_grpc.settings import Settings, SettingsError

    try:
        settings = Settings.load(**overrides)
    except SettingsError as error:
        raise Failure(*error.problems, code=ExitCode.USAGE) from error
    if settings.failpoint:
        failpoints.arm(*settings.failpoint)
    return settings
