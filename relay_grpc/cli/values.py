"""What people type: durations, times, JSON and settings. Each raises typer.BadParameter or Failure: what is wrong."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from relay_grpc.cli.failures import ExitCode, Failure

if TYPE_CHECKING:
    from relay_grpc.settings import Settings

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


def settings_from(**overrides: Any) -> "Settings":
    """The settings of the environment; overrides go by field name and win."""
    from relay_grpc.settings import Settings, SettingsError

    try:
        return Settings.load(**overrides)
    except SettingsError as error:
        raise Failure(*error.problems, code=ExitCode.USAGE) from error
