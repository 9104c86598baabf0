"""Running a server in this process, on an embedded PostgreSQL unless DATABASE_URL names another."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from relay_grpc import datafolder
from relay_grpc.app import App, serving
from relay_grpc.bootstrap import bootstrap
from relay_grpc.cli.failures import Failure
from relay_grpc.cli.values import settings_from
from relay_grpc.db import DatabaseUnusable
from relay_grpc.embedded import EmbeddedError, EmbeddedPostgres
from relay_grpc.schema import migrate
from relay_grpc.settings import Settings
from relay_grpc.transport import StartError

ALIVE_SECONDS = 0.5  # how often the embedded server is looked at


@dataclass(frozen=True, slots=True)
class Ready:
    """What a server runs on. new_keys: API keys by role that were made just now, to be shown once."""

    settings: Settings
    database_url: str
    database_lives: Callable[[], bool]
    new_keys: dict[str, str]


async def announce(ready: Ready, app: App) -> None:
    """Says where the server is, for people."""
    lines = [f"Relay serves gRPC on {app.listen} and HTTP on {app.http_listen}."]
    if ready.settings.database_url is None:
        lines += [f"Data: {ready.settings.data_dir}", f"API keys: {ready.settings.data_dir / datafolder.CREDENTIALS}"]
    print(*lines, "Ctrl-C stops it.", sep="\n", file=sys.stderr, flush=True)  # noqa: T201


def run(job: Callable[[Ready, App], Awaitable[Any]], *, once: bool = False, **overrides: Any) -> None:
    """Starts a server, does the job, and serves on until it is told to stop. once: stops when the job is done.

    Raises Failure for whatever keeps the server from running.
    """
    settings = settings_from(**overrides)
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        with _ready(settings) as ready:
            asyncio.run(_serve(ready, job, once=once))
    except (StartError, DatabaseUnusable, EmbeddedError, datafolder.DataFolderError) as error:
        raise Failure(str(error)) from error
    except KeyboardInterrupt:  # before the server was up
        raise typer.Exit(130) from None


@contextmanager
def _ready(settings: Settings) -> Iterator[Ready]:
    if (url := settings.database_url) is not None:
        if settings.is_development:
            settings = datafolder.with_key_material(settings)
        yield Ready(settings, url.get_secret_value(), lambda: True, {})
        return
    with EmbeddedPostgres(settings.data_dir / datafolder.POSTGRES) as postgres:
        settings = datafolder.with_key_material(settings)
        migrate(postgres.url())
        credentials = settings.data_dir / datafolder.CREDENTIALS
        made = asyncio.run(bootstrap(postgres.url(), settings, new_keys=datafolder.read(credentials) is None))
        if made.keys:
            datafolder.write(credentials, {f"RELAY_{role.upper()}_KEY": key for role, key in made.keys.items()})
        yield Ready(settings, postgres.url(), postgres.alive, made.keys)


async def _serve(ready: Ready, job: Callable[[Ready, App], Awaitable[Any]], *, once: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with serving(ready.settings, ready.database_url) as app:
        gc.freeze()  # what a server is made of stays: looking through it for garbage would stop the loop for 0.1 s
        stopped = asyncio.create_task(stop.wait())
        doing = asyncio.ensure_future(job(ready, app))
        try:
            while not stopped.done() and not (once and doing.done()):
                unfinished = [task for task in (doing, stopped) if not task.done()]
                await asyncio.wait(unfinished, timeout=ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if doing.done():
                    doing.result()
                if not ready.database_lives():
                    folder = ready.settings.data_dir / datafolder.POSTGRES
                    raise DatabaseUnusable(f"the embedded PostgreSQL has ended; see server.log in {folder}")
        finally:
            for task in (doing, stopped):
                task.cancel()
            await asyncio.gather(doing, stopped, return_exceptions=True)
