"""Executions that may be cancelled, resent, reconciled and recovered; connections with health; halts."""

from alembic import op

from relay_grpc import failpoints

revision = "0003"
down_revision = "0002"

TABLES = (
    "SET LOCAL ROLE relay_owner",
    """
    ALTER TABLE connections
      ADD disabled_reason text NOT NULL DEFAULT '',
      ADD deleted_at timestamptz,               -- its executions stay
      ADD failures int NOT NULL DEFAULT 0 CHECK (failures >= 0),  -- attempts that failed since one succeeded
      ADD failing_since timestamptz,
      ADD probes int NOT NULL DEFAULT 0 CHECK (probes >= 0),      -- of them, those made while the breaker was open
      ADD open_until timestamptz,               -- NULL: the breaker is closed; past: half open
      ADD CHECK ((failures = 0) = (failing_since IS NULL)),
      ADD CHECK (deleted_at IS NULL OR NOT (enabled OR is_default)),
      DROP CONSTRAINT connections_name
    """,
    "UPDATE connections SET disabled_reason = 'disabled' WHERE NOT enabled",
    "ALTER TABLE connections ADD CHECK (enabled = (disabled_reason = ''))",
    "CREATE UNIQUE INDEX connections_name ON connections (workspace_id, name) WHERE deleted_at IS NULL",
    # hmac and ed25519 sign; headers are sent with every delivery, a JSON object.
    "CREATE TYPE secret_kind AS ENUM ('hmac', 'ed25519', 'headers')",
    """
    ALTER TABLE connection_secrets
      ADD kind secret_kind NOT NULL DEFAULT 'hmac',
      ADD public_key text,                      -- "whpk_..."
      ADD CHECK ((kind = 'ed25519') = (public_key IS NOT NULL))
    """,
    "CREATE TYPE delivery AS ENUM ('at_least_once', 'at_most_once')",
    """
    ALTER TABLE action_executions
      ADD delivery delivery NOT NULL DEFAULT 'at_least_once',  -- its action's, when it was confirmed
      ADD revision int NOT NULL DEFAULT 1,      -- counts its changes
      ADD resend_count int NOT NULL DEFAULT 0,
      ADD attempts_before int NOT NULL DEFAULT 0 CHECK (attempts_before <= attempt_count),  -- those of earlier sends
      ADD cancel_requested_at timestamptz
    """,
    "DROP INDEX action_executions_due",
    """
    CREATE INDEX action_executions_waiting ON action_executions (connection_id, next_attempt_at)
      WHERE status = 'pending'
    """,
    """
    CREATE INDEX action_executions_unfinished ON action_executions (connection_id)
      WHERE status IN ('executing', 'unknown')
    """,
    "CREATE INDEX action_executions_failed ON action_executions (workspace_id, id) WHERE status = 'failed'",
    "CREATE INDEX action_executions_ended ON action_executions (completed_at) WHERE completed_at IS NOT NULL",
    "CREATE INDEX previews_unused ON previews (expires_at) WHERE execution_id IS NULL",
    # Deliveries that the operator holds back: of a workspace or of all, of a provider or of all.
    """
    CREATE TABLE halts (
      workspace_id uuid NOT NULL REFERENCES workspaces,  -- the system workspace: all of them
      provider text NOT NULL,                   -- empty: all of them
      reason text NOT NULL CHECK (reason <> ''),
      created_at timestamptz NOT NULL DEFAULT now(),
      PRIMARY KEY (workspace_id, provider)
    )
    """,
    """
    CREATE TABLE recoveries (
      id uuid PRIMARY KEY,
      workspace_id uuid NOT NULL REFERENCES workspaces,
      start_time timestamptz NOT NULL,
      end_time timestamptz NOT NULL,
      connection_id uuid,
      total_count bigint NOT NULL,
      recovered_count bigint NOT NULL DEFAULT 0,
      last_id uuid NOT NULL,                    -- executions up to this one have been looked at
      traceparent text NOT NULL,
      cancelled boolean NOT NULL DEFAULT false,
      created_at timestamptz NOT NULL DEFAULT now(),
      completed_at timestamptz,
      CHECK (NOT cancelled OR completed_at IS NOT NULL),
      FOREIGN KEY (workspace_id, connection_id) REFERENCES connections (workspace_id, id)
    )
    """,
    "CREATE INDEX recoveries_under_way ON recoveries (id) WHERE completed_at IS NULL",
)

# What actions.execution.TRANSITIONS says, kept by Postgres whoever writes. Only a resend leaves an ended state.
TRANSITIONS = (
    """
    CREATE FUNCTION relay_guard_execution() RETURNS trigger LANGUAGE plpgsql AS
    $$
    BEGIN
      IF NEW.status <> OLD.status AND NOT (CASE OLD.status
           WHEN 'pending' THEN NEW.status IN ('executing', 'cancelled')
           WHEN 'executing' THEN true
           WHEN 'unknown' THEN NEW.status IN ('success', 'failed')
           ELSE NEW.status = 'pending' AND NEW.resend_count = OLD.resend_count + 1
         END) THEN
        RAISE EXCEPTION 'an execution can''t go from % to %', OLD.status, NEW.status USING ERRCODE = 'check_violation';
      END IF;
      NEW.revision := OLD.revision + 1;
      RETURN NEW;
    END
    $$
    """,
    "REVOKE ALL ON FUNCTION relay_guard_execution FROM PUBLIC",
    """
    CREATE TRIGGER guard BEFORE UPDATE ON action_executions
      FOR EACH ROW EXECUTE FUNCTION relay_guard_execution()
    """,
)

OWN_WORKSPACE = "workspace_id = (SELECT current_setting('relay.workspace_id')::uuid)"
SYSTEM = "'00000000-0000-0000-0000-000000000000'"
# What callers change of an execution, and what attempts do as well. Who it is for and what it does nobody changes.
STEERING = "status, next_attempt_at, completed_at, cancel_requested_at, resend_count, attempts_before"
LIFE = f"{STEERING}, attempt_count, attempt_started_at, lease_token, lease_until"
HEALTH = "enabled, disabled_reason, failures, failing_since, probes, open_until"
SECURITY = (
    *(
        statement
        for table in ("halts", "recoveries")
        for statement in (
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY owner ON {table} TO relay_owner USING (true)",
            f"CREATE POLICY worker ON {table} TO relay_worker USING (true)",
        )
    ),
    f"CREATE POLICY workspace ON recoveries TO relay_app USING ({OWN_WORKSPACE})",
    f"CREATE POLICY workspace ON halts FOR SELECT TO relay_app USING ({OWN_WORKSPACE} OR workspace_id = {SYSTEM})",
    "GRANT SELECT ON halts TO relay_app, relay_worker",
    "GRANT SELECT, INSERT, UPDATE (cancelled, completed_at) ON recoveries TO relay_app",
    "GRANT SELECT, UPDATE (recovered_count, last_id, completed_at), DELETE ON recoveries TO relay_worker",
    f"GRANT UPDATE (name, version, configuration, updated_at, deleted_at, {HEALTH}) ON connections TO relay_app",
    f"GRANT UPDATE ({HEALTH}, updated_at) ON connections TO relay_worker",
    "GRANT UPDATE (expires_at), DELETE ON connection_secrets TO relay_app",
    f"GRANT UPDATE ({STEERING}) ON action_executions TO relay_app",
    "REVOKE UPDATE ON action_executions FROM relay_worker",
    f"GRANT UPDATE ({LIFE}), DELETE ON action_executions TO relay_worker",
    "GRANT DELETE ON previews TO relay_worker",
    "RESET ROLE",
)


def upgrade() -> None:
    for statement in TABLES:
        op.execute(statement)
    failpoints.reach("migration.midway")
    for statement in (*TRANSITIONS, *SECURITY):
        op.execute(statement)
