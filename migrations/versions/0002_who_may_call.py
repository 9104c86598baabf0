"""Key rotation and limits, custom roles, users, live instances, and word of what no longer holds."""

from alembic import op

revision = "0002"
down_revision = "0001"

TABLES = (
    "SET LOCAL ROLE relay_owner",
    # NULL: what the settings say.
    """
    ALTER TABLE workspaces
      ADD calls_per_minute int CHECK (calls_per_minute > 0),
      ADD executions_per_minute int CHECK (executions_per_minute > 0)
    """,
    """
    CREATE TABLE custom_roles (
      workspace_id uuid NOT NULL REFERENCES workspaces,
      name text NOT NULL CHECK (name NOT IN ('admin', 'developer', 'viewer')),
      parent text NOT NULL CHECK (parent IN ('admin', 'developer', 'viewer')),
      scopes text[] NOT NULL CHECK (scopes <> '{}'),
      created_by text NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now(),
      CONSTRAINT custom_roles_name PRIMARY KEY (workspace_id, name)
    )
    """,
    # What a key has of its own, NULL where its workspace's limits are its only ones; and, of the rotation that replaces
    # it, the end. custom_role keeps a role from being deleted while a key that works has it.
    """
    ALTER TABLE api_keys
      ADD key_mac bytea,                        -- HMAC-SHA256 under a pepper: proves the key without an Argon2 hash
      ADD pepper_id text,
      ADD retires_at timestamptz,
      ADD calls_per_minute int CHECK (calls_per_minute > 0),
      ADD executions_per_minute int CHECK (executions_per_minute > 0),
      ADD custom_role text GENERATED ALWAYS AS
        (CASE WHEN revoked_at IS NULL AND role NOT IN ('admin', 'developer', 'viewer') THEN role END) STORED,
      ADD CHECK ((key_mac IS NULL) = (pepper_id IS NULL)),
      ADD CONSTRAINT api_keys_custom_role FOREIGN KEY (workspace_id, custom_role) REFERENCES custom_roles
    """,
    "CREATE INDEX api_keys_custom_role ON api_keys (workspace_id, custom_role) WHERE custom_role IS NOT NULL",
    """
    CREATE TABLE user_roles (
      id uuid PRIMARY KEY,
      workspace_id uuid NOT NULL REFERENCES workspaces,
      issuer text NOT NULL,
      user_id text NOT NULL,
      role text NOT NULL,
      created_by text NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now(),
      custom_role text GENERATED ALWAYS AS
        (CASE WHEN role NOT IN ('admin', 'developer', 'viewer') THEN role END) STORED,
      CONSTRAINT user_roles_one UNIQUE (workspace_id, issuer, user_id),
      CONSTRAINT user_roles_custom_role FOREIGN KEY (workspace_id, custom_role) REFERENCES custom_roles
    )
    """,
    "CREATE INDEX user_roles_workspace ON user_roles (workspace_id, id DESC)",
    "CREATE INDEX user_roles_user ON user_roles (issuer, user_id)",
    # Heartbeats.
    """
    CREATE TABLE instances (
      id uuid PRIMARY KEY,
      started_at timestamptz NOT NULL DEFAULT now(),
      seen_at timestamptz NOT NULL DEFAULT now()
    )
    """,
)

CONFINED = ("custom_roles", "user_roles")
OWN_WORKSPACE = "workspace_id = (SELECT current_setting('relay.workspace_id')::uuid)"
SECURITY = (
    *(
        statement
        for table in (*CONFINED, "instances")
        for statement in (
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY owner ON {table} TO relay_owner USING (true)",
        )
    ),
    *(f"CREATE POLICY workspace ON {table} TO relay_app USING ({OWN_WORKSPACE})" for table in CONFINED),
    "CREATE POLICY worker ON instances TO relay_worker USING (true)",
    "GRANT SELECT, INSERT, DELETE ON custom_roles, user_roles TO relay_app",
    "GRANT UPDATE (id, role, created_by, created_at) ON user_roles TO relay_app",
    "GRANT UPDATE (retires_at) ON api_keys TO relay_app",
    "GRANT UPDATE (key_mac, pepper_id) ON api_keys TO relay_worker",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON instances TO relay_worker",
)

# The look-ups that happen before the workspace is known.
LOOK_UPS = (
    "DROP FUNCTION relay_find_api_key",
    """
    CREATE FUNCTION relay_find_api_keys(wanted text[]) RETURNS TABLE (
      id uuid, workspace_id uuid, public_id text, lineage_id uuid, key_hash text, key_mac bytea, pepper_id text,
      name text, role text, scopes text[], role_parent text, role_scopes text[],
      expires_at timestamptz, has_expired boolean, revoked_at timestamptz,
      calls_per_minute int, executions_per_minute int,
      workspace_calls_per_minute int, workspace_executions_per_minute int
    )
      LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
    $$
      SELECT k.id, k.workspace_id, k.public_id, k.lineage_id, k.key_hash, k.key_mac, k.pepper_id,
             k.name, k.role, k.scopes, r.parent, r.scopes,
             ends.at, coalesce(ends.at <= now(), false), k.revoked_at,
             k.calls_per_minute, k.executions_per_minute, w.calls_per_minute, w.executions_per_minute
        FROM api_keys k
        CROSS JOIN LATERAL (SELECT least(k.expires_at, k.retires_at)) ends(at)
        JOIN workspaces w ON w.id = k.workspace_id
        LEFT JOIN custom_roles r ON r.workspace_id = k.workspace_id AND r.name = k.role
       WHERE k.public_id = ANY(wanted)
    $$
    """,
    """
    CREATE FUNCTION relay_find_user_roles(wanted_issuers text[], wanted_users text[]) RETURNS TABLE (
      issuer text, user_id text, workspace_id uuid, role text, role_parent text, role_scopes text[],
      workspace_calls_per_minute int, workspace_executions_per_minute int
    )
      LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
    $$
      SELECT u.issuer, u.user_id, u.workspace_id, u.role, r.parent, r.scopes,
             w.calls_per_minute, w.executions_per_minute
        FROM unnest(wanted_issuers, wanted_users) AS wanted(issuer, user_id)
        JOIN user_roles u ON u.issuer = wanted.issuer AND u.user_id = wanted.user_id
        JOIN workspaces w ON w.id = u.workspace_id
        LEFT JOIN custom_roles r ON r.workspace_id = u.workspace_id AND r.name = u.role
    $$
    """,
    "REVOKE ALL ON FUNCTION relay_find_api_keys, relay_find_user_roles FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION relay_find_api_keys, relay_find_user_roles TO relay_app",
)

# Whoever changes who may do what, with Relay or with psql, every instance hears of it when the change commits: the
# payload is the workspace. Waiting for the notification costs commits, so none is on the path of Execute.
CHANGES = (
    """
    CREATE FUNCTION relay_tell_change() RETURNS trigger LANGUAGE plpgsql AS
    $$
    BEGIN
      PERFORM pg_notify('relay_changes', to_jsonb(OLD) ->> TG_ARGV[0]);
      RETURN NULL;
    END
    $$
    """,
    "REVOKE ALL ON FUNCTION relay_tell_change FROM PUBLIC",  # firing it asks for no right; making a trigger of it does
    """
    CREATE TRIGGER tell_change AFTER DELETE OR UPDATE OF
      revoked_at, expires_at, retires_at, role, scopes, calls_per_minute, executions_per_minute ON api_keys
      FOR EACH ROW EXECUTE FUNCTION relay_tell_change('workspace_id')
    """,
    """
    CREATE TRIGGER tell_change AFTER DELETE OR UPDATE ON user_roles
      FOR EACH ROW EXECUTE FUNCTION relay_tell_change('workspace_id')
    """,
    """
    CREATE TRIGGER tell_change AFTER DELETE OR UPDATE ON custom_roles
      FOR EACH ROW EXECUTE FUNCTION relay_tell_change('workspace_id')
    """,
    """
    CREATE TRIGGER tell_change AFTER UPDATE OF calls_per_minute, executions_per_minute ON workspaces
      FOR EACH ROW EXECUTE FUNCTION relay_tell_change('id')
    """,
    "RESET ROLE",
)


def upgrade() -> None:
    for statement in (*TABLES, *SECURITY, *LOOK_UPS, *CHANGES):
        op.execute(statement)
