"""Connections to PostgreSQL, in the two roles that serve, and the one place where driver errors become ours.

Requests run as relay_app inside `workspace(...)`: a transaction that row level security confines to one workspace. Work
that spans workspaces (group commit, the sweeper) runs as relay_worker on connections that it keeps. Nobody serves as
relay_owner, which owns the tables.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc import errors

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]

APP, WORKER, OWNER = "relay_app", "relay_worker", "relay_owner"
SCHEMA_REVISION = "0004"
CONNECTIONS = 10  # for requests
WORKER_CONNECTIONS = 8  # two are kept by group commits; retention and recoveries must not hold up the sweeper
# Its statements all go by an index. What Postgres takes for cheaper where it has no statistics yet (after a restore, or
# when a queue fills within a minute) makes a claim among 10,000 connections last longer than COMMAND_TIMEOUT.
WORKER_SETTINGS = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET jit = off"
CONNECT_TIMEOUT = 5.0  # seconds
COMMAND_TIMEOUT = 10.0  # seconds; asyncpg's default is to wait for ever


class DatabaseUnusable(Exception):
    """The database can't be served from; the text tells the operator why and what to do."""


@contextmanager
def translated() -> Iterator[None]:
    """Turns the driver's errors into the API's. What the driver said stays in the cause."""
    try:
        yield
    except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
        raise errors.Contention("another call holds what this one needs; try again") from error
    except (
        OSError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        asyncpg.PostgresConnectionError,
        asyncpg.OperatorInterventionError,
        asyncpg.InsufficientResourcesError,
        asyncpg.ReadOnlySQLTransactionError,
    ) as error:
        raise errors.DependencyUnavailable("the database does not answer; try again") from error


class Database:
    """The pools of one process. Open it with `open`, and close it."""

    def __init__(self, app: "Pool", worker: "Pool", probe: "Pool", listener: "Pool") -> None:
        self._app = app
        self._worker = worker
        self._probe = probe  # apart, so that a busy database does not pass for a dead one
        self._listener = listener

    @classmethod
    async def open(cls, url: str, *, production: bool = False, connections: int = CONNECTIONS) -> "Database":
        """Connects and looks the database over. connections: the most for requests. Raises DatabaseUnusable."""
        try:
            async with AsyncExitStack() as undo:
                pools = (
                    (APP, connections, APP),
                    (WORKER, WORKER_CONNECTIONS, WORKER),
                    (APP, 1, APP),
                    (APP, 1, "listener"),
                )
                database = cls(*[await _pool(url, role, most, name, undo) for role, most, name in pools])
                for pool in (database._app, database._worker):
                    async with pool.acquire() as connection:
                        await _check(connection, production=production)
                undo.pop_all()
        except asyncpg.InvalidParameterValueError as error:  # SET ROLE to a role that is not there
            raise DatabaseUnusable("the database has no Relay in it: run `relay migrate`") from error
        except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise DatabaseUnusable(f"the database can't be reached: {reason(error)}; check DATABASE_URL") from error
        return database

    async def close(self) -> None:
        """Waits 5 s for what is under way, then cuts the connections."""
        self._listener.terminate()
        for pool in (self._app, self._worker, self._probe):
            try:
                async with asyncio.timeout(5):
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    @asynccontextmanager
    async def workspace(
        self, workspace_id: UUID, committed: Callable[[], None] = lambda: None
    ) -> AsyncIterator["Connection"]:
        """A transaction that sees the rows of one workspace: one round trip to begin, one to commit.

        committed: called as soon as it is. A caller that is cancelled during the commit still learns of its end.
        """

        async def commit() -> None:
            await connection.execute("COMMIT")
            committed()

        async with _lent(self._app) as connection:
            try:
                await connection.execute(f"BEGIN; SET LOCAL relay.workspace_id = '{workspace_id}'")
                yield connection
            except TimeoutError:
                raise  # the connection is dropped, and the transaction with it
            except BaseException:
                if not is_lost(connection):
                    await connection.execute("ROLLBACK")
                raise
            await _uncancelled(commit())

    @asynccontextmanager
    async def anyone(self) -> AsyncIterator["Connection"]:
        """A connection as relay_app outside any workspace: it sees no rows and may call relay_find_... functions."""
        async with _lent(self._app) as connection:
            yield connection

    @asynccontextmanager
    async def worker(self) -> AsyncIterator["Connection"]:
        """A connection as relay_worker; each statement is its own transaction. Those that work all the time keep it."""
        async with _lent(self._worker) as connection:
            yield connection

    @asynccontextmanager
    async def listening(
        self, channel: str, heard: Callable[[str], None], lost: Callable[[], None]
    ) -> AsyncIterator["Connection"]:
        """A connection of its own that hears the channel's notifications as long as the block lasts.

        heard: called with the payload of each. lost: called when the database ends the connection.
        """
        async with _lent(self._listener) as connection:
            connection.add_termination_listener(lambda _: lost())
            try:
                await connection.add_listener(channel, lambda *notification: heard(str(notification[-1])))
                yield connection
            finally:
                if not is_lost(connection):
                    connection.terminate()  # or its next borrower would hear too

    async def answers(self) -> bool:
        """Whether the database serves right now, found out within 2 seconds."""
        try:
            async with _lent(self._probe, patience=1) as connection:
                await connection.execute("SELECT", timeout=1)
        except errors.RelayError:
            return False
        return True


async def _uncancelled(work: Coroutine[None, None, None]) -> None:
    """Does the work to its end, and is cancelled only then."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen: the caller is told of its cancellation instead
        raise


def is_lost(connection: "Connection") -> bool:
    """Whether the database has ended this connection. A pool takes such a one back at once, and says so by raising."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        return True


@asynccontextmanager
async def _lent(pool: "Pool", patience: float = CONNECT_TIMEOUT) -> AsyncIterator["Connection"]:
    """A connection of the pool, had within `patience` seconds.

    One that can't be had is a database that does not answer, whatever its words: that it is in maintenance, is not
    there, or knows no such role. One that failed is dropped: taking leave of a server that hangs would hang too, and
    one that was told of a shutdown has not seen its end yet.
    """
    with translated():
        try:
            async with asyncio.timeout(patience):
                connection = await pool.acquire()
        except asyncpg.PostgresError as error:
            raise errors.DependencyUnavailable("the database does not answer; try again") from error
        try:
            yield connection
        except (TimeoutError, asyncpg.OperatorInterventionError, errors.DependencyUnavailable):
            if not is_lost(connection):
                connection.terminate()
            raise
        finally:
            await pool.release(connection)


async def _pool(url: str, role: str, most: int, name: str, undo: AsyncExitStack) -> "Pool":
    """name: what operators see of it in pg_stat_activity."""

    async def as_role(connection: "Connection") -> None:
        more = f"; {WORKER_SETTINGS}" if role == WORKER else ""
        await connection.execute(f"SET ROLE {role}; SET lock_timeout = '1s'{more}")

    async def keep(_connection: "Connection") -> None:
        """Nothing to reset: every setting of ours is local to its transaction. It saves a round trip per call."""

    pool: Pool = asyncpg.create_pool(
        url,
        min_size=0,  # with a floor, asyncpg logs a traceback for every try to restore it
        max_inactive_connection_lifetime=0,
        max_size=most,
        init=as_role,
        reset=keep,
        timeout=CONNECT_TIMEOUT,
        command_timeout=COMMAND_TIMEOUT,
        server_settings={"application_name": f"relay {name}"},
    )
    undo.callback(pool.terminate)
    await pool
    return pool


async def _check(connection: "Connection", *, production: bool) -> None:
    row = await connection.fetchrow(
        """
        SELECT current_user AS role,
               current_setting('server_version_num')::int AS version,
               current_setting('synchronous_commit') AS synchronous_commit,
               rolsuper OR rolbypassrls AS unbound,
               pg_has_role(current_user, $1, 'USAGE') OR EXISTS (
                 SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace AND pg_has_role(relowner, 'USAGE')
               ) AS owner,  -- of anything: a dump restored with --no-owner gives it all to whoever restores it
               to_regclass('alembic_version') IS NOT NULL AS migrated
          FROM pg_roles WHERE rolname = current_user
        """,
        OWNER,
    )
    assert row is not None  # noqa: S101  # current_user is a role
    if row["version"] < 150000:
        raise DatabaseUnusable("Relay needs PostgreSQL 15 or later")
    if row["unbound"] or row["owner"]:
        raise DatabaseUnusable(
            f"the role {row['role']} can bypass row level security: take SUPERUSER, BYPASSRLS, {OWNER} and what it "
            f"owns away; {OWNER} alone owns tables"
        )
    if production and row["synchronous_commit"] == "off":
        raise DatabaseUnusable("synchronous_commit is off: an answered Execute could be lost; set it to on")
    revision = await connection.fetchval("SELECT version_num FROM alembic_version") if row["migrated"] else "none"
    if revision != SCHEMA_REVISION:
        raise DatabaseUnusable(
            f"the schema is at revision {revision} and this version needs {SCHEMA_REVISION}: run `relay migrate`"
        )


def reason(error: BaseException) -> str:
    """One line that an operator may see: never the URL, whose password a driver's text could hold."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error).splitlines()[0]
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, OSError):
        return error.strerror or "the connection failed"
    return "the URL is not one of PostgreSQL's"
