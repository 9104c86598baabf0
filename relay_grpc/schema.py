"""Bringing a database to the schema of this version, with Alembic."""

import logging
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DBAPIError

from relay_grpc.db import DatabaseUnusable, reason

# In a checkout the migrations stand at the top; in a wheel they are inside the package.
_PLACES = (Path(__file__).parent / "migrations", Path(__file__).parent.parent / "migrations")


def migrate(url: str, revision: str = "head") -> None:
    """Applies what is missing, up to `revision`. Runs an event loop of its own. Raises DatabaseUnusable."""
    config = Config()
    config.set_main_option(
        "script_location", next(str(place) for place in _PLACES if place.is_dir()).replace("%", "%%")
    )
    config.attributes["url"] = url
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        command.upgrade(config, revision)
    except DBAPIError as error:
        said = error.orig.__cause__ if error.orig else None
        raise DatabaseUnusable(f"the database can't be migrated: {reason(said or error)}") from error
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise DatabaseUnusable(f"the database can't be migrated: {reason(error)}; check its URL and rights") from error
