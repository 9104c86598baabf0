"""Workspaces, keys, connections, previews, executions, the audit log, and the three roles that may touch them."""

from alembic import op

revision = "0001"
down_revision = None

# Roles belong to the whole cluster, so another database may have made them already.
ROLES = (
    """
    DO $$
    DECLARE name text;
    BEGIN
      FOREACH name IN ARRAY ARRAY['relay_owner', 'relay_app', 'relay_worker'] LOOP
        BEGIN
          EXECUTE format('CREATE ROLE %I NOLOGIN NOSUPERUSER NOBYPASSRLS', name);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
        END;
      END LOOP;
    END $$
    """,
    "GRANT relay_owner, relay_app, relay_worker TO CURRENT_USER",
    "GRANT USAGE, CREATE ON SCHEMA public TO relay_owner",
    "GRANT USAGE ON SCHEMA public TO relay_app, relay_worker",
    "GRANT SELECT ON alembic_version TO relay_app, relay_worker",
    "SET LOCAL ROLE relay_owner",
)

TABLES = (
    """
    CREATE TYPE execution_state AS ENUM ('pending', 'executing', 'success', 'failed', 'cancelled', 'unknown')
    """,
    """
    CREATE TYPE attempt_outcome AS ENUM
      ('success', 'refused', 'timeout', 'unreachable', 'egress_refused', 'interrupted', 'unsendable')
    """,
    "CREATE TYPE event_outcome AS ENUM ('success', 'failed', 'denied')",
    "CREATE TYPE actor_type AS ENUM ('api_key', 'user', 'system', 'operator', 'unknown')",
    """
    CREATE TABLE workspaces (
      id uuid PRIMARY KEY,
      name text NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 64),
      created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    # Refusals of callers that can't be identified are logged here.
    "INSERT INTO workspaces (id, name) VALUES ('00000000-0000-0000-0000-000000000000', 'system')",
    """
    CREATE TABLE api_keys (
      id uuid PRIMARY KEY,
      workspace_id uuid NOT NULL REFERENCES workspaces,
      public_id text NOT NULL UNIQUE,
      lineage_id uuid NOT NULL,                 -- the first key of a chain of rotations
      key_hash text NOT NULL,                   -- Argon2id
      name text NOT NULL,
      role text NOT NULL,
      scopes text[] NOT NULL,                   -- kept of the role's; empty: all of them
      created_by text NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now(),
      last_used_at timestamptz,
      expires_at timestamptz,
      revoked_at timestamptz
    )
    """,
    "CREATE INDEX api_keys_workspace ON api_keys (workspace_id, id DESC)",
    """
    CREATE TABLE connections (
      id uuid PRIMARY KEY,
      workspace_id uuid NOT NULL REFERENCES workspaces,
      name text NOT NULL,
      provider text NOT NULL,
      version int NOT NULL DEFAULT 1 CHECK (version > 0),
      enabled boolean NOT NULL DEFAULT true,
      is_default boolean NOT NULL DEFAULT false,
      configuration jsonb NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now(),
      updated_at timestamptz NOT NULL DEFAULT now(),
      UNIQUE (workspace_id, id),
      CONSTRAINT connections_name UNIQUE (workspace_id, name)
    )
    """,
    "CREATE UNIQUE INDEX connections_one_default ON connections (workspace_id) WHERE is_default",
    """
    CREATE TABLE connection_secrets (
      id uuid PRIMARY KEY,
      workspace_id uuid NOT NULL,
      connection_id uuid NOT NULL,
      encryption_key_id text NOT NULL,
      wrapped_key bytea NOT NULL,
      ciphertext bytea NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now(),
      expires_at timestamptz,
      FOREIGN KEY (workspace_id, connection_id) REFERENCES connections (workspace_id, id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX connection_secrets_connection ON connection_secrets (connection_id)",
    """
    CREATE TABLE previews (
      id uuid PRIMARY KEY,
      workspace_id uuid NOT NULL,
      caller text NOT NULL,
      provider text NOT NULL,
      action_type text NOT NULL,
      action_version int NOT NULL,
      connection_id uuid NOT NULL,
      connection_version int NOT NULL,
      parameters text NOT NULL,                 -- canonical JSON (RFC 8785): jsonb would not keep its bytes
      params_hash text NOT NULL,
      params_prefix text NOT NULL,
      digest text NOT NULL,
      fingerprint bytea NOT NULL,               -- SHA-256 over action, version, connection and parameters
      shown jsonb NOT NULL,                     -- what the caller was told: summary, warnings, delivery plan
      created_at timestamptz NOT NULL DEFAULT now(),
      expires_at timestamptz NOT NULL,
      execution_id uuid,                        -- set once
      FOREIGN KEY (workspace_id, connection_id) REFERENCES connections (workspace_id, id)
    )
    """,
    """
    CREATE TABLE action_executions (
      id uuid PRIMARY KEY,                      -- also the webhook-id
      workspace_id uuid NOT NULL,
      caller text NOT NULL,
      idempotency_key text NOT NULL,
      fingerprint bytea NOT NULL,
      preview_id uuid NOT NULL,
      provider text NOT NULL,
      action_type text NOT NULL,
      action_version int NOT NULL,
      connection_id uuid NOT NULL,
      parameters text NOT NULL,
      traceparent text NOT NULL,
      status execution_state NOT NULL,
      attempt_count int NOT NULL DEFAULT 0,     -- counted when an attempt is claimed, not when it ends
      attempt_started_at timestamptz,
      lease_token uuid,                         -- who may write: a worker that lost its lease matches no row
      lease_until timestamptz,
      next_attempt_at timestamptz,
      created_at timestamptz NOT NULL DEFAULT now(),
      completed_at timestamptz,
      CONSTRAINT action_executions_idempotency UNIQUE (workspace_id, idempotency_key),
      FOREIGN KEY (workspace_id, connection_id) REFERENCES connections (workspace_id, id),
      CHECK ((status = 'pending') = (next_attempt_at IS NOT NULL)),
      CHECK ((status = 'executing') = (lease_token IS NOT NULL)),
      CHECK ((lease_token IS NULL) = (lease_until IS NULL)),
      CHECK ((status IN ('success', 'failed', 'cancelled')) = (completed_at IS NOT NULL))
    ) WITH (fillfactor = 80)
    """,
    "CREATE INDEX action_executions_workspace ON action_executions (workspace_id, id DESC)",
    "CREATE INDEX action_executions_due ON action_executions (next_attempt_at) WHERE status = 'pending'",
    "CREATE INDEX action_executions_leased ON action_executions (lease_until) WHERE status = 'executing'",
    """
    CREATE TABLE execution_attempts (
      execution_id uuid NOT NULL REFERENCES action_executions ON DELETE CASCADE,
      number int NOT NULL,
      workspace_id uuid NOT NULL,
      started_at timestamptz NOT NULL,
      finished_at timestamptz NOT NULL DEFAULT now(),
      outcome attempt_outcome NOT NULL,
      status_code int NOT NULL,
      response_excerpt text NOT NULL,
      error text NOT NULL,
      PRIMARY KEY (execution_id, number)
    )
    """,
    # Ranges over the id, a UUIDv7, are ranges over time.
    """
    CREATE TABLE audit_logs (
      id uuid PRIMARY KEY,
      workspace_id uuid NOT NULL,
      created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
      actor_type actor_type NOT NULL,
      actor_id text NOT NULL,
      actor_name text NOT NULL,
      action text NOT NULL,
      target text NOT NULL,
      action_type text NOT NULL,
      provider text NOT NULL,
      status event_outcome NOT NULL,
      reason text NOT NULL,
      scopes text[] NOT NULL,
      request_id text NOT NULL,
      trace_id text NOT NULL,
      idempotency_key_hash text NOT NULL,
      params_hash text NOT NULL,
      params_prefix text NOT NULL CHECK (length(params_prefix) <= 64),
      peer text NOT NULL,
      duration interval NOT NULL,
      count int NOT NULL CHECK (count > 0)
    ) PARTITION BY RANGE (id)
    """,
    "CREATE TABLE audit_logs_default PARTITION OF audit_logs DEFAULT",
    "CREATE INDEX audit_logs_workspace ON audit_logs (workspace_id, id DESC)",
)

# The first wall is that every query names its workspace; this is the second.
# current_setting raises where no workspace was set, so a transaction that forgot it sees an error, not every row.
CONFINED = (
    "api_keys",
    "connections",
    "connection_secrets",
    "previews",
    "action_executions",
    "execution_attempts",
    "audit_logs",
)
OWN_WORKSPACE = "workspace_id = (SELECT current_setting('relay.workspace_id')::uuid)"
SECURITY = (
    *(
        statement
        for table in (*CONFINED, "workspaces")
        for statement in (
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY owner ON {table} TO relay_owner USING (true)",
        )
    ),
    *(f"CREATE POLICY workspace ON {table} TO relay_app USING ({OWN_WORKSPACE})" for table in CONFINED),
    f"CREATE POLICY workspace ON workspaces TO relay_app USING ({OWN_WORKSPACE.replace('workspace_id =', 'id =', 1)})",
    "GRANT SELECT ON workspaces, action_executions, execution_attempts TO relay_app",
    "GRANT SELECT, INSERT ON api_keys, connections, connection_secrets, previews, audit_logs TO relay_app",
    "GRANT UPDATE (revoked_at) ON api_keys TO relay_app",
    "GRANT UPDATE (is_default) ON connections TO relay_app",
    *(
        f"CREATE POLICY worker ON {table} TO relay_worker USING (true)"
        for table in (
            "api_keys",
            "connections",
            "connection_secrets",
            "previews",
            "action_executions",
            "execution_attempts",
        )
    ),
    "CREATE POLICY worker ON audit_logs FOR INSERT TO relay_worker WITH CHECK (true)",
    "GRANT SELECT (id, last_used_at), UPDATE (last_used_at) ON api_keys TO relay_worker",
    "GRANT SELECT ON connections, connection_secrets, previews, execution_attempts TO relay_worker",
    "GRANT UPDATE (execution_id) ON previews TO relay_worker",
    "GRANT SELECT, INSERT, UPDATE ON action_executions TO relay_worker",
    "GRANT INSERT ON execution_attempts, audit_logs TO relay_worker",
    # The one look-up that happens before the workspace is known.
    """
    CREATE FUNCTION relay_find_api_key(wanted text) RETURNS SETOF api_keys
      LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
      AS 'SELECT * FROM api_keys WHERE public_id = wanted'
    """,
    "REVOKE ALL ON FUNCTION relay_find_api_key FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION relay_find_api_key TO relay_app",
    "RESET ROLE",
)


def upgrade() -> None:
    for statement in (*ROLES, *TABLES, *SECURITY):
        op.execute(statement)
