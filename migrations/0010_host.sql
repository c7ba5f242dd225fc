-- What the sandbox tells and leaves: quarantined modules, and the files of an attempt.

-- A module that was running when two cells died: no attempt of it starts until an operator releases it.
ALTER TABLE versions
  ADD COLUMN quarantined_at timestamptz,
  ADD COLUMN quarantine_reason text;
CREATE INDEX versions_quarantined ON versions (tenant_id, sha256) WHERE quarantined_at IS NOT NULL;
GRANT UPDATE (quarantined_at, quarantine_reason) ON versions TO sandbar_worker, sandbar_api;

-- Regular files that an attempt left and the invocation asked for. A worker writes them before it says how the attempt
-- ended; they are shown when that end stands and was not the loss of the worker. They go with their invocation.
CREATE TABLE artifacts (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  attempt       smallint NOT NULL,
  path          text NOT NULL,
  bytes         bytea NOT NULL,
  PRIMARY KEY (tenant_id, invocation_id, attempt, path),
  FOREIGN KEY (tenant_id, invocation_id) REFERENCES invocations ON DELETE CASCADE
);
ALTER TABLE artifacts ENABLE ROW LEVEL SECURITY;
ALTER TABLE artifacts FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON artifacts TO sandbar_api USING (tenant_id = (SELECT current_tenant()))
  WITH CHECK (tenant_id = (SELECT current_tenant()));
CREATE POLICY worker ON artifacts TO sandbar_worker USING (true) WITH CHECK (true);
CREATE POLICY definer ON artifacts TO sandbar_definer USING (true) WITH CHECK (true);
CREATE POLICY owner ON artifacts TO CURRENT_USER USING (true) WITH CHECK (true);
GRANT SELECT ON artifacts TO sandbar_api;
GRANT SELECT, INSERT, DELETE ON artifacts TO sandbar_worker;
