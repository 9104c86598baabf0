"""What is provable of an event, apart from what can be erased of it; the Merkle log; a partition per month.

Servers of the version before can't write events to it: they are stopped first.
"""

import re

from alembic import op

from relay_grpc import failpoints

revision = "0004"
down_revision = "0003"

# The order of the commitments in audit_logs and of the salts in audit_values: relay_grpc.audit.event.ERASABLE.
ERASABLE = ("actor_id", "actor_name", "target", "note", "peer", "idempotency_key_hash", "params_hash", "params_prefix")
COMMITMENT = "CASE WHEN {name} <> '' THEN sha256(substr(salts, {first}, 16) || convert_to({name}, 'UTF8')) END"
PARTITIONED = ("audit_logs", "audit_values", "audit_leaves")
CONFINED = (*PARTITIONED, "audit_pending", "audit_tiles", "audit_checkpoints")
PARTITIONS_LOCK = 0x52656C6179 + 2  # beside the migrators' and the sequencers'
OWN_WORKSPACE = "workspace_id = (SELECT current_setting('relay.workspace_id')::uuid)"

TABLES = (
    "ALTER TABLE audit_logs RENAME TO audit_logs_before",
    "ALTER TABLE audit_logs_default RENAME TO audit_logs_before_default",
    "ALTER TABLE audit_logs_before RENAME CONSTRAINT audit_logs_pkey TO audit_logs_before_pkey",
    "DROP INDEX audit_logs_workspace",
    """
    CREATE TABLE audit_logs (
      id uuid NOT NULL,
      workspace_id uuid NOT NULL,
      created_at timestamptz NOT NULL,          -- as the id tells it
      actor_type actor_type NOT NULL,
      action text NOT NULL,
      action_type text NOT NULL,
      provider text NOT NULL,
      status event_outcome NOT NULL,
      reason text NOT NULL,
      scopes text[] NOT NULL,
      request_id text NOT NULL,
      trace_id text NOT NULL,
      duration interval NOT NULL,
      count int NOT NULL CHECK (count > 0),
      commitments bytea[] NOT NULL,             -- to the values in audit_values; NULL: there is none
      PRIMARY KEY (workspace_id, id)
    ) PARTITION BY RANGE (id)
    """,
    "CREATE INDEX audit_logs_action ON audit_logs (workspace_id, action, id)",
    "CREATE INDEX audit_logs_provider ON audit_logs (workspace_id, provider, id) WHERE provider <> ''",
    # Comparing enums is not leakproof: under row level security, it is no index's condition.
    "CREATE INDEX audit_logs_denied ON audit_logs (workspace_id, id) WHERE status = 'denied'",
    "CREATE INDEX audit_logs_failed ON audit_logs (workspace_id, id) WHERE status = 'failed'",
    "CREATE INDEX audit_logs_request ON audit_logs (workspace_id, request_id, id) WHERE request_id <> ''",
    f"""
    CREATE TABLE audit_values (                 -- NULL: erased
      id uuid NOT NULL,
      workspace_id uuid NOT NULL,
      {", ".join(f"{name} text" for name in ERASABLE)},
      salts bytea NOT NULL,                     -- 16 bytes for each value; zeros where it is erased
      CHECK (length(params_prefix) <= 64),
      PRIMARY KEY (workspace_id, id)
    ) PARTITION BY RANGE (id)
    """,
    "CREATE INDEX audit_values_actor ON audit_values (workspace_id, actor_id, id) WHERE actor_id <> ''",
    "CREATE INDEX audit_values_target ON audit_values (workspace_id, target, id) WHERE target <> ''",
    """
    CREATE TABLE audit_leaves (                 -- where an event stands in its workspace's log
      event_id uuid NOT NULL,
      workspace_id uuid NOT NULL,
      leaf_index bigint NOT NULL CHECK (leaf_index >= 0),
      PRIMARY KEY (workspace_id, event_id)
    ) PARTITION BY RANGE (event_id)
    """,
    "CREATE INDEX audit_leaves_index ON audit_leaves (workspace_id, leaf_index)",
    """
    CREATE TABLE audit_pending (                -- events that the sequencer has yet to give a place in the log
      event_id uuid PRIMARY KEY,
      workspace_id uuid NOT NULL
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000)  -- every row goes within seconds
    """,
    """
    CREATE TABLE audit_tiles (                  -- 256 hashes each, those at the right edge fewer (C2SP tlog-tiles)
      workspace_id uuid NOT NULL,
      level smallint NOT NULL,
      index bigint NOT NULL,
      hashes bytea NOT NULL CHECK (length(hashes) BETWEEN 32 AND 8192 AND length(hashes) % 32 = 0),
      PRIMARY KEY (workspace_id, level, index)
    )
    """,
    "ALTER TABLE audit_tiles ALTER COLUMN hashes SET STORAGE EXTERNAL",  # hashes don't compress
    """
    CREATE TABLE audit_checkpoints (
      workspace_id uuid NOT NULL,
      tree_size bigint NOT NULL CHECK (tree_size > 0),
      root_hash bytea NOT NULL,
      note text NOT NULL,
      created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
      PRIMARY KEY (workspace_id, tree_size)
    )
    """,
    "CREATE INDEX audit_checkpoints_time ON audit_checkpoints (workspace_id, created_at)",
)

FUNCTIONS = (
    # Parsed now, so that no search path concerns them, and one expression, so that a statement takes them in whole.
    f"""
    CREATE FUNCTION relay_commitments(salts bytea, {", ".join(f"{name} text" for name in ERASABLE)}) RETURNS bytea[]
      LANGUAGE sql STABLE
      RETURN ARRAY[{", ".join(COMMITMENT.format(name=name, first=16 * n + 1) for n, name in enumerate(ERASABLE))}]
    """,
    """
    CREATE FUNCTION relay_first_uuid7(moment timestamptz) RETURNS uuid
      LANGUAGE sql IMMUTABLE
      RETURN (lpad(to_hex(floor(extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
    """,
    """
    CREATE FUNCTION relay_time_of(id uuid) RETURNS timestamptz
      LANGUAGE sql IMMUTABLE
      RETURN timestamptz 'epoch' + interval '1 ms' * ('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint
    """,
    # Every event waits for its place in the log, whoever wrote it.
    """
    CREATE FUNCTION relay_await_place() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
      AS $$
      BEGIN
        INSERT INTO audit_pending (event_id, workspace_id) SELECT id, workspace_id FROM added;
        RETURN NULL;
      END $$
    """,
    # Grants keep Relay's roles from it; this keeps an owner from doing it by mistake.
    """
    CREATE FUNCTION relay_append_only() RETURNS trigger
      LANGUAGE plpgsql SET search_path = pg_catalog
      AS $$
      BEGIN
        RAISE EXCEPTION '% is append only: % is refused', TG_TABLE_NAME, TG_OP USING ERRCODE = '42501';
      END $$
    """,
    """
    CREATE FUNCTION relay_only_grows() RETURNS trigger
      LANGUAGE plpgsql SET search_path = pg_catalog
      AS $$
      BEGIN
        IF substr(NEW.hashes, 1, length(OLD.hashes)) <> OLD.hashes THEN
          RAISE EXCEPTION 'a tile of the audit log only grows' USING ERRCODE = '42501';
        END IF;
        RETURN NEW;
      END $$
    """,
    # The partitions of a month, where they are missing, with what the DEFAULT partitions took of it. ATTACH stops those
    # who write to DEFAULT, and then refuses their events: where the month has begun, writers are stopped before it (the
    # sequencer tries again by itself). Locks are taken in the order in which others take them.
    """
    CREATE FUNCTION relay_make_audit_month(month timestamp) RETURNS void
      LANGUAGE plpgsql SET search_path = public, pg_temp
      AS $$
      DECLARE
        parent text; part text; spare text;
        first uuid := relay_first_uuid7(month AT TIME ZONE 'UTC');
        beyond uuid := relay_first_uuid7((month + interval '1 month') AT TIME ZONE 'UTC');
        range_ text; strays boolean;
      BEGIN
        FOREACH parent IN ARRAY ARRAY['audit_logs', 'audit_values', 'audit_leaves'] LOOP
          part := parent || to_char(month, '_YYYY_MM');
          spare := parent || '_default';
          CONTINUE WHEN to_regclass(part) IS NOT NULL;
          IF month <= now() AT TIME ZONE 'UTC' THEN
            LOCK TABLE ONLY audit_values, ONLY audit_logs IN SHARE ROW EXCLUSIVE MODE;
          END IF;
          range_ := format('%1$I >= %2$L AND %1$I < %3$L',
                           CASE parent WHEN 'audit_leaves' THEN 'event_id' ELSE 'id' END, first, beyond);
          EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', part, parent);
          EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE %s)', spare, range_) INTO strays;
          IF strays THEN
            EXECUTE format('LOCK TABLE %I IN SHARE ROW EXCLUSIVE MODE', spare);
            EXECUTE format('INSERT INTO %I SELECT * FROM %I WHERE %s', part, spare, range_);
            EXECUTE format('ALTER TABLE %I DISABLE TRIGGER USER', spare);
            EXECUTE format('DELETE FROM %I WHERE %s', spare, range_);
            EXECUTE format('ALTER TABLE %I ENABLE TRIGGER USER', spare);
          END IF;
          EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                         parent, part, first, beyond);
          PERFORM relay_wall_audit_table(part);
        END LOOP;
      END $$
    """,
    # Nobody has rights on a partition: there, walls stand against GRANT ... ON ALL TABLES, which somebody may think of.
    """
    CREATE FUNCTION relay_wall_audit_table(walled text) RETURNS void
      LANGUAGE plpgsql SET search_path = public, pg_temp
      AS $$
      BEGIN
        EXECUTE format('CREATE TRIGGER no_truncate BEFORE TRUNCATE ON %I EXECUTE FUNCTION relay_append_only()', walled);
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', walled);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', walled);
        EXECUTE format('CREATE POLICY owner ON %I TO relay_owner USING (true)', walled);
      END $$
    """,
    # The partitions of this month, of the next three, and of every earlier month that DEFAULT has events of. Its
    # callers can say neither which nor when, so they need no more than the right to call it. Returns how many events
    # are left in DEFAULT: those of clocks that are months ahead.
    f"""
    CREATE FUNCTION relay_make_audit_partitions() RETURNS bigint
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
      AS $$
      DECLARE
        this timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
        months timestamp[]; month timestamp;
      BEGIN
        PERFORM pg_advisory_xact_lock({PARTITIONS_LOCK});  -- one at a time
        months := ARRAY(
          SELECT this + make_interval(months => ahead) FROM generate_series(0, 3) ahead
          UNION
          SELECT date_trunc('month', relay_time_of(id) AT TIME ZONE 'UTC') FROM audit_logs_default
           WHERE id < relay_first_uuid7(this AT TIME ZONE 'UTC')
        );
        FOREACH month IN ARRAY months LOOP
          PERFORM relay_make_audit_month(month);
        END LOOP;
        RETURN (SELECT count(*) FROM audit_logs_default);
      END $$
    """,  # noqa: S608  # the number is ours
)

# What is refused of a table, by statement trigger and, where rows are concerned, by row: partitions take those over.
REFUSED = {
    "audit_logs": "UPDATE OR DELETE",
    "audit_leaves": "UPDATE OR DELETE",
    "audit_checkpoints": "UPDATE",  # old ones go with what they are about: relay_grpc.audit.retention
    "audit_tiles": "DELETE",
}
TRIGGERS = (
    """
    CREATE TRIGGER await_place AFTER INSERT ON audit_logs
      REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION relay_await_place()
    """,
    "CREATE TRIGGER only_grows BEFORE UPDATE ON audit_tiles FOR EACH ROW EXECUTE FUNCTION relay_only_grows()",
    *(
        f"CREATE TRIGGER append_only BEFORE {changes} ON {table} FOR EACH ROW EXECUTE FUNCTION relay_append_only()"
        for table, changes in REFUSED.items()
    ),
)

# Their reasons were words of people, which can be erased from now on.
WORDS = ("ActionsService.ReconcileExecution", "operator.Halt", "operator.RewrapSecrets")

OLD_MONTHS = """
    SELECT relay_make_audit_month(month)
      FROM (SELECT DISTINCT date_trunc('month', relay_time_of(id) AT TIME ZONE 'UTC') AS month
              FROM audit_logs_before WHERE id < relay_first_uuid7(now())) m
"""

# What is erasable of an event that an earlier version wrote, with salts made here: 122 random bits each.
OLD_EVENTS = f"""
    WITH old AS MATERIALIZED (
      SELECT id, workspace_id, relay_time_of(id) AS created_at, actor_type, actor_id, actor_name, action, target,
             action_type, provider, status, scopes, request_id, trace_id, idempotency_key_hash, params_hash,
             params_prefix, peer, duration, count, CASE WHEN words THEN '' ELSE reason END AS reason,
             CASE WHEN words THEN reason ELSE '' END AS note,
             {" || ".join(["uuid_send(gen_random_uuid())"] * len(ERASABLE))} AS salts
        FROM audit_logs_before,
             LATERAL (SELECT status = 'success' AND action = ANY('{{{", ".join(WORDS)}}}') AS words) w
    ), kept AS (
      INSERT INTO audit_values (id, workspace_id, {", ".join(ERASABLE)}, salts)
      SELECT id, workspace_id, {", ".join(ERASABLE)}, salts FROM old
    )
    INSERT INTO audit_logs (id, workspace_id, created_at, actor_type, action, action_type, provider, status, reason,
                            scopes, request_id, trace_id, duration, count, commitments)
    SELECT id, workspace_id, created_at, actor_type, action, action_type, provider, status, reason,
           scopes, request_id, trace_id, duration, count, relay_commitments(salts, {", ".join(ERASABLE)})
      FROM old
"""  # noqa: S608  # the names are ours

# Events as they are read. Not for writing: audit.store.appending says how.
VIEW = f"""
    CREATE VIEW audit_events WITH (security_invoker = true) AS
    SELECT l.*, {", ".join(f"v.{name}" for name in ERASABLE)}, v.salts, e.leaf_index
      FROM audit_logs l
      LEFT JOIN audit_values v ON v.workspace_id = l.workspace_id AND v.id = l.id
      LEFT JOIN audit_leaves e ON e.workspace_id = l.workspace_id AND e.event_id = l.id
"""  # noqa: S608  # the names are ours

SECURITY = (
    *(f"CREATE POLICY workspace ON {table} TO relay_app USING ({OWN_WORKSPACE})" for table in CONFINED),
    *(f"CREATE POLICY worker ON {table} TO relay_worker USING (true)" for table in CONFINED),
    "GRANT SELECT ON audit_events, audit_leaves, audit_pending, audit_tiles, audit_checkpoints TO relay_app",
    "GRANT SELECT, INSERT ON audit_logs, audit_values TO relay_app",
    "GRANT SELECT, INSERT ON audit_logs, audit_leaves, audit_checkpoints TO relay_worker",
    "GRANT INSERT ON audit_values TO relay_worker",
    "GRANT SELECT, DELETE ON audit_pending TO relay_worker",
    "GRANT SELECT, INSERT, UPDATE (hashes) ON audit_tiles TO relay_worker",
    *(
        f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC"
        for name in re.findall(r"CREATE FUNCTION (\w+)", "".join(FUNCTIONS))
    ),
    "GRANT EXECUTE ON FUNCTION relay_commitments TO relay_app, relay_worker",
    "GRANT EXECUTE ON FUNCTION relay_make_audit_partitions TO relay_worker",
)


def upgrade() -> None:
    op.execute("SET LOCAL ROLE relay_owner")
    for statement in (
        *TABLES,
        *FUNCTIONS,
        *(f"CREATE TABLE {table}_default PARTITION OF {table} DEFAULT" for table in PARTITIONED),
        *TRIGGERS,
        *(
            f"SELECT relay_wall_audit_table('{table}')"
            for table in (*CONFINED, *(f"{name}_default" for name in PARTITIONED))
        ),
        OLD_MONTHS,
        OLD_EVENTS,
    ):
        op.execute(statement)
    failpoints.reach("migration.midway")
    for statement in ("DROP TABLE audit_logs_before", VIEW, *SECURITY, "RESET ROLE"):
        op.execute(statement)
