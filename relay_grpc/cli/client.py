"""Which server a command speaks to, and with which key."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from relay_grpc.cli.failures import Exit, Failure, of_call

if TYPE_CHECKING:
    from relay.client import Relay


@dataclass(frozen=True, slots=True)
class Target:
    """What the options before the command say; the object of every command's context."""

    address: str
    api_key: str | None = field(repr=False)
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
    api_key = target.api_key or _development_key(target.address)
    if not api_key:
        raise Failure(
            "no API key: set RELAY_API_KEY or give --api-key",
            "a development server on this machine writes one when 'relay serve' starts first",
            code=Exit.DENIED,
        )
    try:
        relay = connect(target.address, api_key=api_key, insecure=target.insecure)
    except ValueError as error:
        raise Failure(str(error), code=Exit.USAGE) from error
    with relay:
        try:
            yield relay
        except RelayError as error:
            raise of_call(error, target.address) from error


def _development_key(address: str) -> str | None:
    """The admin key that a development server keeps in its data folder. It goes to no other machine."""
    from relay_grpc import datafolder
    from relay_grpc.settings import Address, Settings, SettingsError

    try:
        settings = Settings.load()
        local = Address.parse(address).is_loopback
    except (SettingsError, ValueError):
        return None
    kept = datafolder.read(settings.data_dir / datafolder.CREDENTIALS) if local and settings.is_development else None
    return kept.get("RELAY_ADMIN_KEY") if kept else None
