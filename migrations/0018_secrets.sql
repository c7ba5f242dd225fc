-- Secrets of tenants, sealed by the program: Postgres never sees a value or an unwrapped key.
--
-- tenant_keys   one data key per tenant, wrapped by the master key named in `master`; made with the first secret.
-- secrets       the names, in the clear: they are what a person searches for.
-- secret_versions  the values, sealed by the tenant's data key and bound to tenant, name and version.

CREATE TABLE tenant_keys (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  master     text NOT NULL,            -- which master key wraps it: a fingerprint
  wrapped    bytea NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  wrapped_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id)
);
CREATE INDEX tenant_keys_master ON tenant_keys (master);

CREATE TABLE secrets (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  name       text NOT NULL CHECK (name ~ '^[A-Za-z_][A-Za-z0-9_]{0,63}$'),
  version    int NOT NULL CHECK (version > 0), -- the current one; numbers are never used twice while the name lives
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id, name)
);

CREATE TABLE secret_versions (
  tenant_id  uuid NOT NULL,
  name       text NOT NULL,
  version    int NOT NULL,
  sealed     bytea NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id, name, version),
  FOREIGN KEY (tenant_id, name) REFERENCES secrets ON DELETE CASCADE
);

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['tenant_keys', 'secrets', 'secret_versions'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY worker ON %I TO sandbar_worker USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

GRANT SELECT, INSERT ON tenant_keys TO sandbar_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON secrets TO sandbar_api;
GRANT SELECT, INSERT, DELETE ON secret_versions TO sandbar_api;
GRANT SELECT ON tenant_keys, secrets, secret_versions TO sandbar_worker;
GRANT UPDATE (master, wrapped, wrapped_at) ON tenant_keys TO sandbar_worker; -- a new master key
