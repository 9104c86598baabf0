"""`relay serve` and `relay demo`: a server in the foreground."""

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where the embedded database and the development keys are. Unset: relay in the user's data folder.",
        file_okay=False,
    ),
]
Listen = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where gRPC is served. Unset: 127.0.0.1:50051.")]
HttpListen = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where metrics and health are. Unset: 127.0.0.1:8080.")
]


def serve(data_dir: DataDir = None, listen: Listen = None, http_listen: HttpListen = None) -> None:
    """Run a server until Ctrl-C or SIGTERM.

    Without DATABASE_URL it runs on a PostgreSQL of its own in the data folder, and makes the first API keys there.
    """
    from relay_grpc.cli.running import announce, run

    run(announce, data_dir=data_dir, listen=listen, http_listen=http_listen)


def demo(
    data_dir: DataDir = None,
    listen: Listen = None,
    http_listen: HttpListen = None,
    once: Annotated[
        bool, typer.Option("--once", metavar="", help="Stop when the webhook is verified; exit 1 if it is not.")
    ] = False,
) -> None:
    """Run a server, and see one webhook sent and verified.

    It goes on serving and prints commands to try.
    """
    from relay_grpc.cli.demo import main_job
    from relay_grpc.cli.running import run

    run(main_job(once=once), once=once, data_dir=data_dir, listen=listen, http_listen=http_listen)
