"""The operator's commands on the database itself: `relay migrate`, `relay bootstrap`, `relay keygen`."""

from typing import Annotated

import typer

from relay_grpc.cli.client import Json
from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.output import show_json, tell, tell_secrets
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
    """Print fresh values for RELAY_ENCRYPTION_KEYS, RELAY_KEY_PEPPERS and RELAY_HASH_KEY."""
    from relay_grpc.datafolder import new_key_material

    for name, value in new_key_material().items():
        typer.echo(f"{name}={value}")
