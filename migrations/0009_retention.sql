-- Retention: what ended longer ago than a tenant's history reaches back is exported, if asked for, and deleted.
-- After 0002 and 0008: it knows their tables.

-- Days that ended invocations are kept; NULL: the installation's default.
ALTER TABLE tenants ADD COLUMN retention_days int CHECK (retention_days BETWEEN 1 AND 3650);

-- How far the walk through a tenant's history has come, and when the next one begins.
CREATE TABLE retention_walks (
  tenant_id uuid PRIMARY KEY REFERENCES tenants ON DELETE CASCADE,
  after_id  uuid,
  next_at   timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE retention_walks ENABLE ROW LEVEL SECURITY;
ALTER TABLE retention_walks FORCE ROW LEVEL SECURITY;
CREATE POLICY worker ON retention_walks TO sandbar_worker USING (true) WITH CHECK (true);
DO $$ BEGIN EXECUTE 'CREATE POLICY owner ON retention_walks TO CURRENT_USER USING (true) WITH CHECK (true)'; END $$;
GRANT SELECT, INSERT, UPDATE ON retention_walks TO sandbar_worker;

-- Forget everything about these invocations. The caller knows that they have ended.
CREATE FUNCTION drop_history(p_tenant uuid, p_ids uuid[]) RETURNS bigint
LANGUAGE plpgsql SET search_path = sandbar, pg_temp SET enable_seqscan = off AS $$
DECLARE
  n bigint;
BEGIN
  DELETE FROM dead_letters d WHERE d.tenant_id = p_tenant AND d.invocation_id = ANY (p_ids);
  DELETE FROM invocation_tags d USING (
      SELECT v.invocation_id, g.key, g.value FROM invocations v CROSS JOIN LATERAL jsonb_each_text(v.tags) g
      WHERE v.tenant_id = p_tenant AND v.invocation_id = ANY (p_ids)) o
    WHERE d.tenant_id = p_tenant AND d.key = o.key AND d.value = o.value AND d.invocation_id = o.invocation_id;
  DELETE FROM attempts d WHERE d.tenant_id = p_tenant AND d.invocation_id = ANY (p_ids);
  DELETE FROM logs d WHERE d.tenant_id = p_tenant AND d.invocation_id = ANY (p_ids);
  DELETE FROM live_logs d WHERE d.tenant_id = p_tenant AND d.invocation_id = ANY (p_ids);
  DELETE FROM progress d WHERE d.tenant_id = p_tenant AND d.invocation_id = ANY (p_ids);
  DELETE FROM results d WHERE d.tenant_id = p_tenant AND d.invocation_id = ANY (p_ids);
  DELETE FROM invocations d WHERE d.tenant_id = p_tenant AND d.invocation_id = ANY (p_ids);
  GET DIAGNOSTICS n = ROW_COUNT;
  RETURN n;
END $$;
REVOKE EXECUTE ON FUNCTION drop_history FROM PUBLIC;
GRANT EXECUTE ON FUNCTION drop_history TO sandbar_worker, sandbar_definer;
GRANT SELECT, DELETE ON invocations, invocation_tags, attempts, results, logs, live_logs, progress, dead_letters
  TO sandbar_worker, sandbar_definer;

-- ---------------------------------------------------------------- autovacuum, table by table
--
-- The queue's own tables have their settings where they are made: their dead rows are all of their rows, so they are
-- vacuumed by count and without pausing.

-- History is inserted once and deleted in order of age. By default a vacuum for inserts comes after a fifth of the table
-- has been added: at 100 million rows that is a month without a visibility map, and then one long run that freezes a
-- month's worth. Smaller steps keep index-only scans cheap (counts of the queue's depth, tags) and each run short.
ALTER TABLE invocations SET (autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE results SET (autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE attempts SET (autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE logs SET (autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE invocation_tags SET (autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_scale_factor = 0.05);
-- Planning by statistics of a fifth ago would take a new tenant's millions for nothing.
ALTER TABLE invocations SET (autovacuum_analyze_scale_factor = 0.02);
ALTER TABLE results SET (autovacuum_analyze_scale_factor = 0.02);
-- Every row is updated once (its kind of failure) soon after it was inserted, and read by a partial index until then.
ALTER TABLE dead_letters SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
-- Each key is inserted and deleted within its time to live, as many an hour as there are requests.
ALTER TABLE idempotency_keys SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.05);
-- A row per cancellation of something that runs, gone within seconds; heartbeats read all of it.
ALTER TABLE cancels SET (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);
