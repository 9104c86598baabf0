"""Where the operator's commands find the database that they work on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from relay_grpc.cli.failures import ExitCode, Failure
from relay_grpc.cli.values import settings_from


@contextmanager
def database(data_dir: Any) -> Iterator[str]:
    """The URL of DATABASE_URL, or of the embedded server: the one that runs, or else one that runs for the block."""
    from relay_grpc.datafolder import POSTGRES
    from relay_grpc.db import DatabaseUnusable
    from relay_grpc.embedded import EmbeddedError, EmbeddedPostgres, running_at
    from relay_grpc.schema import migrate

    # As in development: they need a database, not the key material that production serves with.
    settings = settings_from(data_dir=data_dir, env="development")
    folder = settings.data_dir / POSTGRES
    try:
        if settings.database_url is not None:
            yield settings.database_url.get_secret_value()
        elif (url := running_at(folder)) is not None:
            yield url
        elif (folder / "data").exists():
            with EmbeddedPostgres(folder) as server:
                migrate(server.url())  # as every start of it
                yield server.url()
        else:
            raise Failure(
                f"no DATABASE_URL, and no embedded database in {settings.data_dir}: 'relay serve' makes one",
                code=ExitCode.USAGE,
            )
    except (DatabaseUnusable, EmbeddedError) as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(f"can't use {error.filename or folder}: {error.strerror}") from error
