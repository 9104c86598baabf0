"""The operator's commands on the database itself: `relay migrate`, `bootstrap`, `keygen` and `rewrap`."""

from collections import Counter
from typing import Annotated

import typer

from relay_grpc.cli.client import Json
from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.operator import database
from relay_grpc.cli.output import console, listing, show_json, tell, tell_secrets
from relay_grpc.cli.server import DataDir
from relay_grpc.cli.values import settings_from


def migrate(
    database_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="PostgreSQL's. Unset: DATABASE_PUBLIC_URL, or else DATABASE_URL."),
    ] = None,
) -> None:
    """Bring the database to the schema of this version."""
    # As in development: a migration needs a URL, not the key material that production serves with.
    settings = settings_from(database_url=database_url, database_public_url=database_url, env="development")
    url = settings.database_public_url or settings.database_url
    if url is None:
        raise Failure("no DATABASE_URL: the embedded database is migrated by 'relay serve' itself", code=ExitCode.USAGE)

    from relay_grpc.db import DatabaseUnusable
    from relay_grpc.schema import migrate

    try:
        migrate(url.get_secret_value())
    except DatabaseUnusable as error:
        raise Failure(str(error)) from error
    tell("The database has the schema of this version.")


def bootstrap(
    workspace: Annotated[str, typer.Option(metavar="NAME", help="The workspace's name.")] = "default",
    new_keys: Annotated[
        bool, typer.Option("--new-keys", metavar="", help="Make keys although the workspace exists.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a workspace on DATABASE_URL, and an admin and a developer key for it."""
    settings = settings_from()
    url = settings.database_url
    if url is None:
        raise Failure(
            "no DATABASE_URL: the embedded database is bootstrapped by 'relay serve' itself", code=ExitCode.USAGE
        )

    import asyncio

    from relay_grpc.bootstrap import bootstrap
    from relay_grpc.datafolder import DataFolderError, with_key_material
    from relay_grpc.db import DatabaseUnusable

    try:
        if settings.is_development:
            settings = with_key_material(settings)
        made = asyncio.run(bootstrap(url.get_secret_value(), settings, workspace=workspace, new_keys=new_keys))
    except (DatabaseUnusable, DataFolderError) as error:
        raise Failure(str(error)) from error
    if as_json:
        show_json({"workspaceId": str(made.workspace_id), "keys": made.keys})
        return
    tell(f"workspace: {made.workspace_id}")
    if made.keys:
        tell_secrets({f"{role} key": key for role, key in made.keys.items()})
    else:
        tell("It exists; --new-keys makes new keys beside those it has.")


def keygen() -> None:
    """Print fresh values for the settings that hold key material: encryption, peppers, hashes, audit signatures."""
    from relay_grpc.datafolder import new_key_material

    for name, value in new_key_material().items():
        typer.echo(f"{name}={value}")


def rewrap(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Encrypt the secrets of connections under the first of RELAY_ENCRYPTION_KEYS, whichever they are under.

    Every server must have that key already; they go on meanwhile. A run that breaks off is continued by the next one.
    Afterwards the other keys can be taken away. Exit code 1: some secrets are left.
    """
    import asyncio

    from relay_grpc.connections.rewrap import rewrap

    # As in development: it needs a database and these keys, and nothing else that production serves with.
    keys = {key.id: key.key for key in settings_from(data_dir=data_dir, env="development").encryption_keys}
    if not keys:
        raise Failure("no RELAY_ENCRYPTION_KEYS: the first of them encrypts from now on", code=ExitCode.USAGE)
    current = next(iter(keys))
    with database(data_dir) as url, console(stderr=True).status("") as status:
        done = asyncio.run(rewrap(url, keys, lambda count: status.update(f"{count} done")))
    if as_json:
        left = {str(id_): problem for id_, problem in done.left.items()}
        show_json({"currentKey": current, "rewrapped": done.count, "left": left, "secretsByKey": dict(done.by_key)})
    else:
        tell(f"Encrypted anew, under the key {current}: {done.count}.")
        rows = ((id_, str(count)) for id_, count in done.by_key.items())
        tell(listing(("KEY", "SECRETS"), rows, none="There are no secrets."))
    if problems := Counter(done.left.values()):
        raise Failure(*(f"left as they were, {count}: {problem}" for problem, count in problems.items()))
    if done.by_key.keys() - {current}:
        raise Failure(
            "secrets came under another key meanwhile: put the first key first on every server, and run it again"
        )
