"""`relay serve`: a server in the foreground, on an embedded PostgreSQL unless DATABASE_URL names another."""

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from relay_grpc import datafolder
from relay_grpc.app import App, StartError, serving
from relay_grpc.bootstrap import bootstrap
from relay_grpc.db import DatabaseUnusable
from relay_grpc.embedded import EmbeddedError, EmbeddedPostgres
from relay_grpc.schema import migrate
from relay_grpc.settings import Settings, SettingsError

log = logging.getLogger(__name__)
ALIVE_SECONDS = 0.5  # how often the embedded server is looked at

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Where the embedded database and the development keys are. [default: relay in the XDG data home]",
        show_default=False,
        file_okay=False,
    ),
]
Listen = Annotated[str | None, typer.Option("--listen", help="HOST:PORT for gRPC. [default: 127.0.0.1:50051]")]
HttpListen = Annotated[
    str | None, typer.Option("--http-listen", help="HOST:PORT for metrics and health. [default: 127.0.0.1:8080]")
]


@dataclass(frozen=True, slots=True)
class Ready:
    """What a server runs on. new_keys: API keys by role that were made just now, to be shown once."""

    settings: Settings
    database_url: str
    database_lives: Callable[[], bool]
    new_keys: dict[str, str]


def serve(data_dir: DataDir = None, listen: Listen = None, http_listen: HttpListen = None) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Without DATABASE_URL it runs on a PostgreSQL of its own in the data folder, and makes the first API keys.
    """

    async def announce(ready: Ready, app: App) -> None:
        settings = ready.settings
        print(f"Relay serves gRPC on {app.listen} and HTTP on {app.http_listen}.", file=sys.stderr)  # noqa: T201
        if settings.database_url is None:
            print(f"Data: {settings.data_dir}", file=sys.stderr)  # noqa: T201
            print(f"API keys: {settings.data_dir / datafolder.CREDENTIALS}", file=sys.stderr)  # noqa: T201
        print("Ctrl-C stops it.", file=sys.stderr)  # noqa: T201

    run(announce, data_dir=data_dir, listen=listen, http_listen=http_listen)


def run(job: Callable[[Ready, App], Awaitable[Any]], *, once: bool = False, **overrides: Any) -> None:
    """Starts a server, does the job, and serves on until it is told to stop. once: stops when the job is done.

    Ends the process with 2 for wrong settings and 1 for whatever else keeps the server from running.
    """
    try:
        settings = Settings.load(**overrides)
        logging.basicConfig(
            level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        with _ready(settings) as ready:
            asyncio.run(_serve(ready, job, once=once))
    except SettingsError as error:
        for problem in error.problems:
            _complain(problem)
        raise typer.Exit(2) from None
    except (StartError, DatabaseUnusable, EmbeddedError) as error:
        _complain(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:  # before the server was up
        raise typer.Exit(130) from None


def _complain(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/] {sentence}", markup=True)


@contextmanager
def _ready(settings: Settings) -> Iterator[Ready]:
    if (url := settings.database_url) is not None:
        if settings.is_development:
            settings = datafolder.with_key_material(settings)
        yield Ready(settings, url.get_secret_value(), lambda: True, {})
        return
    with EmbeddedPostgres(settings.data_dir / "postgres") as postgres:
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
        stopped = asyncio.create_task(stop.wait())
        doing = asyncio.ensure_future(job(ready, app))
        try:
            await asyncio.wait([doing, stopped], return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                await doing
            while not once and not stopped.done():
                if not ready.database_lives():
                    raise DatabaseUnusable(
                        f"the embedded PostgreSQL has ended; its log is {ready.settings.data_dir / 'postgres' / 'server.log'}"
                    )
                await asyncio.wait([stopped], timeout=ALIVE_SECONDS)
        finally:
            for task in (doing, stopped):
                task.cancel()
            await asyncio.gather(doing, stopped, return_exceptions=True)
