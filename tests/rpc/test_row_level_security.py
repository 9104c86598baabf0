"""The second wall between tenants: what Postgres itself keeps from the roles that serve.

What is tested comes from the catalogue of Postgres, so that the next table, policy or function is looked at without a
line here.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.harness import Databases, Relay

OURS, THEIRS = UUID(int=1), UUID(int=2)
APP, WORKER, OWNER = "relay_app", "relay_worker", "relay_owner"
OWN_WORKSPACE = "({} = ( SELECT (current_setting('relay.workspace_id'::text))::uuid AS current_setting))"
# Of these everybody reads the rows of the system workspace too, which are meant for all, and changes none.
TOLD_TO_ALL = {"halts"}
OWN_OR_SYSTEM = f"({OWN_WORKSPACE} OR ({{}} = '{UUID(int=0)}'::uuid))"
# What relay_worker, which no workspace confines, may do to a table or to columns of it.
WORKER_MAY = {
    "action_executions": {"SELECT", "INSERT", "UPDATE", "DELETE"},
    "alembic_version": {"SELECT"},
    "api_keys": {"SELECT", "UPDATE"},
    "audit_checkpoints": {"SELECT", "INSERT"},
    "audit_leaves": {"SELECT", "INSERT"},
    "audit_logs": {"SELECT", "INSERT"},
    "audit_pending": {"SELECT", "DELETE"},
    "audit_tiles": {"SELECT", "INSERT", "UPDATE"},
    "audit_values": {"INSERT"},
    "connection_secrets": {"SELECT"},
    "connections": {"SELECT", "UPDATE"},
    "execution_attempts": {"SELECT", "INSERT"},
    "halts": {"SELECT"},
    "instances": {"SELECT", "INSERT", "UPDATE", "DELETE"},
    "previews": {"SELECT", "UPDATE", "DELETE"},
    "recoveries": {"SELECT", "UPDATE", "DELETE"},
}
# What relay_app may do to the audit log.
APP_MAY_OF_AUDIT = {
    "audit_checkpoints": {"SELECT"},
    "audit_events": {"SELECT"},
    "audit_leaves": {"SELECT"},
    "audit_logs": {"SELECT", "INSERT"},
    "audit_pending": {"SELECT"},
    "audit_tiles": {"SELECT"},
    "audit_values": {"SELECT", "INSERT"},
}
# What the look-ups before a workspace is known tell of rows that their caller can't see. No other function tells any.
TOLD = {
    "relay_find_api_keys": {
        *("id", "workspace_id", "public_id", "lineage_id", "key_hash", "key_mac", "pepper_id", "name", "role"),
        *("scopes", "role_parent", "role_scopes", "expires_at", "has_expired", "revoked_at", "calls_per_minute"),
        *("executions_per_minute", "workspace_calls_per_minute", "workspace_executions_per_minute"),
    },
    "relay_find_user_roles": {
        *("issuer", "user_id", "workspace_id", "role", "role_parent", "role_scopes"),
        *("workspace_calls_per_minute", "workspace_executions_per_minute"),
    },
}
# Who may call a function besides its owner. What is not here, nobody: triggers need no caller.
CALLERS = {
    "relay_find_api_keys": {APP},
    "relay_find_user_roles": {APP},
    "relay_commitments": {APP, WORKER},
    "relay_make_audit_partitions": {WORKER},
}
# With the owner's rights, and without telling any row.
SILENT = {"relay_await_place", "relay_make_audit_partitions"}
# Views, which see what their reader sees.
VIEWS = {"audit_events"}


@pytest.fixture(scope="module")
async def superuser(databases: Databases) -> AsyncIterator[Any]:
    """A database as it is migrated, by its superuser."""
    async with databases.new() as url:
        connection = await asyncpg.connect(url)
        yield connection
        await connection.close()


@pytest.fixture(scope="module")
async def bare(databases: Databases) -> AsyncIterator[Any]:
    """The same without constraints and triggers, with a row of each of two workspaces in each table, fit or not."""
    async with databases.new() as url:
        connection = await asyncpg.connect(url)
        await connection.execute("DELETE FROM workspaces")
        for table, owner in (await confined(connection)).items():
            names = "SELECT conname FROM pg_constraint WHERE conrelid = $1::regclass AND contype <> 'n'"
            for (name,) in await connection.fetch(f"{names} ORDER BY contype = 'p'", table):
                await connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name} CASCADE")
            await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            for column in await columns(connection, table):
                if column["attnotnull"]:
                    await connection.execute(f"ALTER TABLE {table} ALTER {column['attname']} DROP NOT NULL")
            await connection.execute(f"INSERT INTO {table} ({owner}) VALUES ($1), ($2)", OURS, THEIRS)
        yield connection
        await connection.close()


async def confined(connection: Any) -> dict[str, str]:
    """Every table with rows of workspaces, and the column that says whose they are."""
    rows = await connection.fetch(
        """
        SELECT relname, attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
         WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
           AND attname = CASE relname WHEN 'workspaces' THEN 'id' ELSE 'workspace_id' END
         ORDER BY relname
        """
    )
    assert len(rows) > 9
    return dict(map(tuple, rows))


async def columns(connection: Any, table: str) -> list[Any]:
    """The columns of a table, and whether relay_app may change them."""
    rows: list[Any] = await connection.fetch(
        """
        SELECT attname, attnotnull, has_column_privilege($2, attrelid, attnum, 'UPDATE') AS changeable
          FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped
        """,
        table,
        APP,
    )
    return rows


async def privileges(connection: Any, role: str) -> dict[str, set[str]]:
    """What the role may do to each relation, or to a column of it."""
    rows = await connection.fetch(
        """
        SELECT relname, privilege
          FROM pg_class,
               unnest('{SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER}'::text[]) privilege
         WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f')
           AND (has_table_privilege($1, oid, privilege)
                OR privilege IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES')
                   AND has_any_column_privilege($1, oid, privilege))
        """,
        role,
    )
    may: dict[str, set[str]] = {}
    for relation, privilege in rows:
        may.setdefault(relation, set()).add(privilege)
    return may


@asynccontextmanager
async def acting(connection: Any, role: str, workspace_id: UUID | None = OURS) -> AsyncIterator[None]:
    """The connection has this role's rights in the block, and what it changes is undone."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(f"SET LOCAL ROLE {role}")
        if workspace_id:
            await connection.execute(f"SET LOCAL relay.workspace_id = '{workspace_id}'")
            assert await connection.fetchval("SHOW relay.workspace_id") == str(workspace_id)
        yield
    finally:
        await transaction.rollback()


async def assert_refused(connection: Any, statement: str, *arguments: Any) -> None:
    """It ends with insufficient_privilege, as rights that lack and rows of other workspaces both do."""
    with pytest.raises(asyncpg.PostgresError) as caught:
        async with connection.transaction():
            await connection.execute(statement, *arguments)
    assert caught.value.sqlstate == "42501", statement


async def test_relay_app_in_one_workspace_reaches_no_row_of_another(bare: Any) -> None:
    may = await privileges(bare, APP)
    for table, owner in (await confined(bare)).items():
        assert "SELECT" in may[table]
        changeable = [column["attname"] for column in await columns(bare, table) if column["changeable"]]
        assert owner not in changeable
        async with acting(bare, APP):
            assert [row[owner] for row in await bare.fetch(f"SELECT {owner} FROM {table}")] == [OURS], table
            await assert_refused(bare, f"INSERT INTO {table} ({owner}) VALUES ($1)", THEIRS)
            for column in changeable:
                changed = await bare.execute(f"UPDATE {table} SET {column} = {column} WHERE {owner} = $1", THEIRS)
                assert changed == "UPDATE 0", (table, column)
            if not changeable:
                await assert_refused(bare, f"UPDATE {table} SET {owner} = {owner}")
            if "DELETE" in may[table]:
                assert await bare.execute(f"DELETE FROM {table} WHERE {owner} = $1", THEIRS) == "DELETE 0", table
            else:
                await assert_refused(bare, f"DELETE FROM {table}")


async def test_the_policies_hold_alone_where_every_right_is_given_away(bare: Any) -> None:
    for table, owner in (await confined(bare)).items():
        transaction = bare.transaction()
        await transaction.start()
        await bare.execute(f"GRANT ALL ON {table} TO {APP}")
        await bare.execute(f"SET LOCAL ROLE {APP}")
        await bare.execute(f"SET LOCAL relay.workspace_id = '{OURS}'")
        await assert_refused(bare, f"INSERT INTO {table} ({owner}) VALUES ($1)", THEIRS)
        changed = 0 if table in TOLD_TO_ALL else 1
        if changed:
            await assert_refused(bare, f"UPDATE {table} SET {owner} = $1", THEIRS)
        assert await bare.execute(f"UPDATE {table} SET {owner} = {owner}") == f"UPDATE {changed}", table
        assert await bare.execute(f"DELETE FROM {table}") == f"DELETE {changed}", table
        await bare.execute("RESET ROLE")
        left = [row[owner] for row in await bare.fetch(f"SELECT {owner} FROM {table} ORDER BY {owner} DESC")]
        assert left == [THEIRS, OURS][: 2 - changed], table
        await transaction.rollback()


@pytest.mark.parametrize("hole", ["DISABLE ROW LEVEL SECURITY", "NO FORCE ROW LEVEL SECURITY", "no policy", "for all"])
async def test_the_catalogue_shows_a_table_that_is_not_walled(superuser: Any, hole: str) -> None:
    assert await unwalled(superuser) == {}
    transaction = superuser.transaction()
    await transaction.start()
    await superuser.execute("CREATE TABLE next_one (workspace_id uuid); GRANT SELECT ON next_one TO relay_app")
    await superuser.execute("ALTER TABLE next_one ENABLE ROW LEVEL SECURITY")
    await superuser.execute("ALTER TABLE next_one FORCE ROW LEVEL SECURITY")
    if hole != "no policy":
        everything = (
            "true" if hole == "for all" else "workspace_id = (SELECT current_setting('relay.workspace_id')::uuid)"
        )
        await superuser.execute(f"CREATE POLICY workspace ON next_one TO relay_app USING ({everything})")
    if hole.endswith("SECURITY"):
        await superuser.execute(f"ALTER TABLE next_one {hole}")
    assert set(await unwalled(superuser)) == {"next_one"}
    await transaction.rollback()


async def unwalled(connection: Any) -> dict[str, str]:
    """What anybody who serves may touch and no policy confines, and how it is open."""
    owners = await confined(connection)
    open_: dict[str, str] = {}
    for role in (APP, WORKER):
        for relation, may in (await privileges(connection, role)).items():
            row = await connection.fetchrow(
                """
                SELECT relrowsecurity AND relforcerowsecurity AS walled, pg_get_userbyid(relowner) AS owner,
                       relkind = 'v' AND 'security_invoker=true' = ANY(reloptions) AS sees_as_its_reader,
                       (SELECT array_agg(ARRAY[cmd, permissive, qual, coalesce(with_check, '')])
                          FROM pg_policies
                         WHERE tablename = relname AND roles && ARRAY[$2, 'public']::name[]) AS policies
                  FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname = $1
                """,
                relation,
                role,
            )
            owner = owners.get(relation, "")
            expected = ["ALL", "PERMISSIVE", OWN_WORKSPACE.format(owner), ""]
            if relation in TOLD_TO_ALL:
                expected = ["SELECT", "PERMISSIVE", OWN_OR_SYSTEM.format(owner, owner), ""]
            if (relation == "alembic_version" or row["sees_as_its_reader"]) and may == {"SELECT"}:
                continue
            if not row["walled"]:
                open_[relation] = "no row level security that its owner is held to"
            elif role == APP and row["policies"] != [expected]:
                open_[relation] = f"relay_app by {row['policies']}"
            elif role == WORKER and not row["policies"]:
                open_[relation] = "no policy"
    return open_


async def test_no_role_that_serves_may_more_than_it_must(superuser: Any) -> None:
    """TRUNCATE asks no policy, REFERENCES tells which rows there are, and a trigger runs with others' rights."""
    may = {role: await privileges(superuser, role) for role in (APP, WORKER)}
    assert may[WORKER] == WORKER_MAY
    # So not the instances, which are nobody's.
    assert set(may[APP]) == {*await confined(superuser), *VIEWS, "alembic_version"}
    assert {table: rights for table, rights in may[APP].items() if table.startswith("audit_")} == APP_MAY_OF_AUDIT
    assert set().union(*may[APP].values()) == {"SELECT", "INSERT", "UPDATE", "DELETE"}
    assert await privileges(superuser, "public") == {}
    readable = "SELECT attname FROM pg_attribute WHERE attrelid = 'api_keys'::regclass AND attnum > 0"
    rows = await superuser.fetch(f"{readable} AND has_column_privilege($1, attrelid, attnum, 'SELECT')", WORKER)
    assert {row["attname"] for row in rows} <= {"id", "last_used_at"}  # nothing that proves a key
    assert [
        row["attname"]
        for row in await superuser.fetch(
            """
            SELECT attname FROM pg_attribute WHERE attrelid = 'audit_tiles'::regclass AND attnum > 0
               AND has_column_privilege($1, attrelid, attnum, 'UPDATE')
            """,
            WORKER,
        )
    ] == ["hashes"]


async def test_only_workers_lease_and_nobody_changes_what_is_sent(superuser: Any) -> None:
    changeable = """
        SELECT attname FROM pg_attribute WHERE attrelid = 'action_executions'::regclass AND attnum > 0
           AND has_column_privilege($1, attrelid, attnum, 'UPDATE')
    """
    app, worker = [{row["attname"] for row in await superuser.fetch(changeable, role)} for role in (APP, WORKER)]
    assert worker - app == {"lease_token", "lease_until", "attempt_count", "attempt_started_at"}
    assert not app - worker
    assert not worker & {"workspace_id", "connection_id", "caller", "action_type", "parameters", "idempotency_key"}


async def test_no_row_refers_to_one_of_another_workspace(superuser: Any) -> None:
    """Foreign keys see past policies, so every one that relay_app can fill holds the workspace too."""
    rows = await superuser.fetch(
        """
        SELECT conrelid::regclass::text AS source, conname,
               EXISTS (SELECT FROM unnest(conkey, confkey) AS k(mine, its)
                         JOIN pg_attribute m ON m.attrelid = conrelid AND m.attnum = mine
                         JOIN pg_attribute i ON i.attrelid = confrelid AND i.attnum = its
                        WHERE m.attname = 'workspace_id' AND confrelid::regclass::text || '.' || i.attname
                              IN ('workspaces.id', confrelid::regclass::text || '.workspace_id')
               ) AS bound
          FROM pg_constraint WHERE contype = 'f' AND conparentid = 0 AND has_table_privilege($1, conrelid, 'INSERT')
        """,
        APP,
    )
    assert len(rows) > 5
    assert [row["conname"] for row in rows if not row["bound"]] == []


async def test_without_a_workspace_relay_app_gets_an_error_instead_of_rows(bare: Any) -> None:
    for table in await confined(bare):
        async with acting(bare, APP, workspace_id=None):
            with pytest.raises(asyncpg.PostgresError) as caught:
                await bare.fetch(f"SELECT FROM {table}")
        # Never set, or ended with its transaction.
        assert caught.value.sqlstate in ("42704", "22P02"), table


async def test_a_workspace_ends_with_its_transaction(relay: Relay) -> None:
    async with relay.app.db.workspace(relay.tenant.workspace_id) as connection:
        assert await connection.fetchval("SELECT count(*) FROM workspaces") == 1
    async with relay.app.db.anyone() as connection:
        assert not await connection.fetchval("SELECT current_setting('relay.workspace_id', true)")
        with pytest.raises(asyncpg.PostgresError):
            await connection.fetch("SELECT FROM workspaces")


async def test_a_view_shows_what_the_tables_behind_it_show(bare: Any) -> None:
    async with acting(bare, APP):
        assert [row["workspace_id"] for row in await bare.fetch("SELECT workspace_id FROM audit_events")] == [OURS]
    async with acting(bare, WORKER):
        await assert_refused(bare, "SELECT FROM audit_events")


async def test_partitions_are_nobodys_and_walled_where_every_right_is_given_away(bare: Any) -> None:
    partitions = await bare.fetch(
        "SELECT oid::regclass::text AS name FROM pg_class WHERE relispartition AND relkind = 'r'"
    )
    assert len(partitions) == 3 * 5  # DEFAULT, this month, and three more, of three tables
    for (name,) in partitions:
        for role in (APP, WORKER):
            async with acting(bare, role):
                await assert_refused(bare, f"SELECT FROM {name}")
    assert await bare.fetchval("SELECT count(*) FROM audit_logs_default") == 2, "whose ids are NULL"
    for role in (APP, WORKER):
        transaction = bare.transaction()
        await transaction.start()
        await bare.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        await bare.execute(f"SET LOCAL ROLE {role}")
        for (name,) in partitions:
            assert await bare.fetch(f"SELECT FROM {name}") == []
            await assert_refused(bare, f"INSERT INTO {name} (workspace_id) VALUES ($1)", OURS)
        await transaction.rollback()


async def test_functions_tell_what_they_must_and_to_those_who_need_them_alone(superuser: Any) -> None:
    rows = await superuser.fetch(
        """
        SELECT proname, prosecdef, proconfig, pg_get_userbyid(proowner) AS owner, prorettype::regtype::text AS returns,
               (SELECT array_agg(name) FROM unnest(proargnames, proargmodes) AS a(name, mode) WHERE mode = 't') AS told,
               (SELECT array_agg(coalesce(nullif(grantee, 0)::regrole::text, 'PUBLIC'))
                  FROM aclexplode(coalesce(proacl, acldefault('f', proowner)))) AS callers
          FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        """
    )
    for row in rows:
        assert set(row["callers"]) == {OWNER} | CALLERS.get(row["proname"], set()), row["proname"]
        assert row["owner"] == OWNER, "who is held to its policies, and no superuser"
    definers = {row["proname"]: row for row in rows if row["prosecdef"]}
    assert definers.keys() == TOLD.keys() | SILENT
    for name, row in definers.items():
        assert row["proconfig"] == ["search_path=public, pg_temp"], name
        if name in SILENT:
            assert row["returns"] in ("trigger", "bigint"), name
        else:
            assert set(row["told"]) == TOLD[name]


async def test_look_ups_find_what_is_named_in_full_and_nothing_else(superuser: Any) -> None:
    transaction = superuser.transaction()
    await transaction.start()
    await superuser.execute("INSERT INTO workspaces (id, name) VALUES ($1, 'theirs')", THEIRS)
    await superuser.execute(
        """
        INSERT INTO api_keys (id, workspace_id, public_id, lineage_id, key_hash, name, role, scopes, created_by)
        VALUES ($1, $1, 'abcdefghijkl', $1, '', '', 'viewer', '{}', '')
        """,
        THEIRS,
    )
    await superuser.execute(
        """
        INSERT INTO user_roles (id, workspace_id, issuer, user_id, role, created_by)
        VALUES ($1, $1, 'i', 'u', 'viewer', '')
        """,
        THEIRS,
    )
    await superuser.execute(f"SET LOCAL ROLE {APP}")
    by_key, by_user = "SELECT FROM relay_find_api_keys($1)", "SELECT FROM relay_find_user_roles($1, $2)"
    assert len(await superuser.fetch(by_key, ["abcdefghijkl"])) == 1
    for wanted in (None, [], [None], [""], ["%"], ["abcdefghijk"], ["ABCDEFGHIJKL"], ["abcdefghijkl "]):
        assert await superuser.fetch(by_key, wanted) == [], wanted
    assert len(await superuser.fetch(by_user, ["i"], ["u"])) == 1
    for issuer, user in ((None, "u"), ("i", None), ("", "u"), ("i", ""), ("%", "%"), ("i", "U"), ("I", "u")):
        assert await superuser.fetch(by_user, [issuer], [user]) == [], (issuer, user)
    for issuers, users in ((None, ["u"]), (["i"], None), ([], []), (["i"], []), (["i", "x"], ["x", "u"])):
        assert await superuser.fetch(by_user, issuers, users) == [], (issuers, users)
    await transaction.rollback()


@pytest.mark.parametrize("role", [APP, WORKER])
async def test_nobody_who_serves_can_become_somebody_else_by_rights(superuser: Any, role: str) -> None:
    rows = await superuser.fetch(
        """
        SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication,
               (SELECT count(*) FROM pg_auth_members WHERE member = r.oid) AS memberships,
               (SELECT count(*) FROM pg_class WHERE relowner = r.oid) AS owned,
               has_schema_privilege(rolname, 'public', 'CREATE') AS creates
          FROM pg_roles r WHERE rolname = $1
        """,
        role,
    )
    assert not any(rows[0].values())


@pytest.mark.parametrize("role", [APP, WORKER])
async def test_a_login_that_may_only_serve_finds_no_way_around(databases: Databases, role: str) -> None:
    async with databases.new() as url:
        admin = await asyncpg.connect(url)
        login = f"only_{role}"
        await admin.execute(f"CREATE ROLE {login} LOGIN NOINHERIT IN ROLE {role}")
        other = WORKER if role == APP else APP
        try:
            connection = await asyncpg.connect(url, user=login)
            await connection.execute(f"SET ROLE {role}")
            for statement in (
                f"SET ROLE {OWNER}",
                f"SET ROLE {other}",
                f"SET SESSION AUTHORIZATION {OWNER}",
                f"SET SESSION AUTHORIZATION {other}",
                f"GRANT {OWNER} TO {login}",
                f"ALTER ROLE {role} BYPASSRLS",
                "SET session_replication_role = replica",
                "CREATE FUNCTION public.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
                "CREATE VIEW public.mine AS SELECT * FROM workspaces",
                "ALTER POLICY workspace ON workspaces USING (true)",
                "SELECT * FROM pg_authid",
                "COPY workspaces TO PROGRAM 'cat'",
                "SELECT pg_read_file('PG_VERSION')",
            ):
                await assert_refused(connection, statement)
            await connection.execute(f"SET relay.workspace_id = '{OURS}'")
            # row_security = off asks for all rows or an error, and doesn't get them.
            await connection.execute("SET row_security = off")
            await assert_refused(
                connection, "SELECT FROM action_executions" if role == APP else "SELECT FROM workspaces"
            )
            await connection.close()
        finally:
            await admin.execute(f"DROP ROLE {login}")
            await admin.close()
