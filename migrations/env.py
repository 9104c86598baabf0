"""Alembic's environment: runs the revisions of versions/ on one asyncpg connection, one migrator at a time.

In the end the audit log has the partitions that it needs, whichever revision the database was at.
"""

import asyncio

import asyncpg
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

# Any constant will do, as long as every migrator takes the same.
MIGRATION_LOCK = 0x52656C6179


def run(connection: Connection) -> None:
    connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
    connection.execute(text("SET LOCAL lock_timeout = '5s'"))
    context.configure(connection=connection, transactional_ddl=True)
    context.run_migrations()
    if connection.scalar(text("SELECT to_regproc('relay_make_audit_partitions')")):
        connection.execute(text("SET LOCAL ROLE relay_owner"))
        connection.execute(text("SELECT relay_make_audit_partitions()"))


async def main() -> None:
    url = context.config.attributes["url"]
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url, timeout=5), poolclass=NullPool
    )
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


asyncio.run(main())
