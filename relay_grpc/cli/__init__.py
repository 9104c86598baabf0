"""The command `relay`."""

import typer

from relay_grpc.cli.demo import demo
from relay_grpc.cli.serve import serve

app = typer.Typer(add_completion=False)
app.command()(serve)
app.command()(demo)


def main() -> None:
    app()
