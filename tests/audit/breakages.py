"""What keeps events from being written, and how a change that can't be told is answered then."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.harness import Relay


@asynccontextmanager
async def no_event_can_be_written(relay: Relay, table: str = "audit_logs") -> AsyncIterator[None]:
    await relay.sql(f"ALTER TABLE {table} ADD CONSTRAINT broken CHECK (false) NOT VALID")
    try:
        yield
    finally:
        await relay.sql(f"ALTER TABLE {table} DROP CONSTRAINT broken")


@asynccontextmanager
async def no_partitions(relay: Relay) -> AsyncIterator[None]:
    """Not even the one for what has none."""
    partitions = await relay.sql(
        """
        SELECT relname, pg_get_expr(relpartbound, c.oid) AS bounds FROM pg_class c
         WHERE oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_logs'::regclass)
        """
    )
    for row in partitions:
        await relay.sql(f"ALTER TABLE audit_logs DETACH PARTITION {row['relname']}")
    try:
        yield
    finally:
        for row in partitions:
            await relay.sql(f"ALTER TABLE audit_logs ATTACH PARTITION {row['relname']} {row['bounds']}")


@asynccontextmanager
async def full_disk(relay: Relay) -> AsyncIterator[None]:
    """As PostgreSQL says it where a table can't be extended."""
    await relay.sql(
        """
        CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
          BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$
        """
    )
    await relay.sql("CREATE TRIGGER full_disk BEFORE INSERT ON audit_values EXECUTE FUNCTION full_disk()")
    try:
        yield
    finally:
        await relay.sql("DROP FUNCTION full_disk() CASCADE")


BREAKAGES: dict[str, tuple[Callable[[Relay], Any], str]] = {
    "values": (lambda relay: no_event_can_be_written(relay, "audit_values"), "INTERNAL"),
    "pending": (lambda relay: no_event_can_be_written(relay, "audit_pending"), "INTERNAL"),
    "partitions": (no_partitions, "INTERNAL"),
    "disk": (full_disk, "UNAVAILABLE"),
}
