-- Limits that a tenant gives its keys, beside those of its tasks (0017): how much may be submitted with one. A key and what
-- rotations made in its place are one line: they share the limits, and the count.

ALTER TABLE api_keys ADD COLUMN line uuid; -- the key that the first rotation began with; null: this one
CREATE INDEX api_keys_by_line ON api_keys (tenant_id, (COALESCE(line, key_id)));
GRANT SELECT (line) ON api_keys TO sandbar_api;

CREATE TABLE key_quotas (
  tenant_id uuid NOT NULL,
  key_id    uuid NOT NULL,             -- the first of its line
  quotas    jsonb NOT NULL CHECK (jsonb_typeof(quotas) = 'object'),
  PRIMARY KEY (tenant_id, key_id),
  FOREIGN KEY (tenant_id, key_id) REFERENCES api_keys ON DELETE CASCADE
);

COMMENT ON COLUMN quota_windows.task_id IS 'nil: the tenant as a whole; else a task, or the first key of a line';

DO $$
BEGIN
  ALTER TABLE key_quotas ENABLE ROW LEVEL SECURITY;
  ALTER TABLE key_quotas FORCE ROW LEVEL SECURITY;
  CREATE POLICY tenant ON key_quotas TO sandbar_api USING (tenant_id = (SELECT current_tenant()))
    WITH CHECK (tenant_id = (SELECT current_tenant()));
  CREATE POLICY worker ON key_quotas TO sandbar_worker USING (true) WITH CHECK (true);
  CREATE POLICY definer ON key_quotas TO sandbar_definer USING (true) WITH CHECK (true);
  EXECUTE 'CREATE POLICY owner ON key_quotas TO CURRENT_USER USING (true) WITH CHECK (true)';
END $$;

GRANT SELECT, INSERT, UPDATE, DELETE ON key_quotas TO sandbar_api;
-- With the last key of a line goes its count.
GRANT DELETE ON quota_windows TO sandbar_api;
