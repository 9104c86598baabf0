"""Which server a command speaks to, and as whom."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from relay_grpc.cli.failures import ExitCode, Failure, of_call

if TYPE_CHECKING:
    from relay.client import Relay


@dataclass(frozen=True, slots=True)
class Target:
    """What the options before the command say; the object of every command's context."""

    address: str
    api_key: str | None = field(repr=False)
    token: str | None = field(repr=False)
    workspace: str | None
    insecure: bool
    as_json: bool


def _here_or_before(ctx: typer.Context, value: bool) -> bool:
    """`relay --json keys list` is `relay keys list --json`."""
    target: Target = ctx.obj
    return value or target.as_json


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", metavar="", callback=_here_or_before)]


@contextmanager
def connected(ctx: typer.Context) -> Iterator["Relay"]:
    """A client for the block; a call in it that fails ends the command with a Failure."""
    from relay.client import connect
    from relay.errors import RelayError

    target: Target = ctx.obj
    api_key, token = _credential(target)
    try:
        with connect(
            target.address, api_key=api_key, token=token, workspace=target.workspace, insecure=target.insecure
        ) as relay:
            yield relay
    except RelayError as error:
        raise of_call(error, target.address, local=_is_local(target.address)) from error
    except UnicodeError as error:
        raise Failure("a value is not text that UTF-8 can carry", code=ExitCode.USAGE) from error
    except ValueError as error:  # what can't be a target, a key or a field of a request
        raise Failure(str(error), code=ExitCode.USAGE) from error


def _credential(target: Target) -> tuple[str, None] | tuple[None, str]:
    """The API key or else the token that `connect` is to be given."""
    if target.api_key and target.token:
        raise Failure(
            "an API key and a token: set one of RELAY_API_KEY and RELAY_TOKEN, or empty the other", code=ExitCode.USAGE
        )
    if target.token:
        return None, target.token
    api_key = target.api_key or _development_key(target.address)
    if not api_key:
        raise Failure(
            "no API key and no token: set RELAY_API_KEY or RELAY_TOKEN, or give --api-key or --token",
            "a development server on this machine writes a key when 'relay serve' starts first",
            code=ExitCode.DENIED,
        )
    return api_key, None


def _is_local(address: str) -> bool:
    from relay_grpc.setting_types import Address

    try:
        return address.startswith("unix:") or bool(Address.parse(address).is_loopback)
    except ValueError:
        return False


def _development_key(address: str) -> str | None:
    """The admin key of this machine's development server, if that is whom the address names and nobody else."""
    from relay_grpc import datafolder
    from relay_grpc.setting_types import Address
    from relay_grpc.settings import Settings, SettingsError

    try:
        settings = Settings.load()
        asked = Address.parse(address)
        if not settings.is_development or not asked.is_loopback or asked.port != settings.listen.port:
            return None
        kept = datafolder.read(settings.data_dir / datafolder.CREDENTIALS)
    except (SettingsError, OSError, ValueError):  # a server's troubles, which this command is not
        return None
    return kept.get("RELAY_ADMIN_KEY") if kept else None
