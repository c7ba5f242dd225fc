-- Budgets: how much of the usage ledger a tenant, or one of its tasks, means to use per day or month; and events, which say
-- that a threshold of one was reached. A budget stops nothing: quotas do.

CREATE TABLE budgets (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  name       text NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
  budget_id  uuid NOT NULL,             -- another when it measures something else: its events are its own
  task_id    uuid,                      -- NULL: all of the tenant's
  measure    text NOT NULL CHECK (measure IN ('fuel', 'cpu_s', 'attempts')),
  period     text NOT NULL CHECK (period IN ('day', 'month')), -- of UTC
  amount     bigint NOT NULL CHECK (amount > 0),
  thresholds smallint[] NOT NULL CHECK (cardinality(thresholds) BETWEEN 1 AND 10),
  looked_at  timestamptz,
  updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id, name),
  FOREIGN KEY (tenant_id, task_id) REFERENCES tasks
);
CREATE INDEX budgets_to_look_at ON budgets (looked_at NULLS FIRST);

CREATE TABLE events (
  tenant_id uuid NOT NULL REFERENCES tenants,
  event_id  uuid NOT NULL,              -- version 7: order of ids is order of time
  at        timestamptz NOT NULL DEFAULT clock_timestamp(),
  kind      text NOT NULL,
  data      jsonb NOT NULL,
  once      text NOT NULL,              -- what happens once has one of these: the second is no event
  PRIMARY KEY (tenant_id, event_id),
  UNIQUE (tenant_id, once)
);
CREATE INDEX events_by_age ON events (at);

-- What a budget has used in the period that p_at is in. Months and days are of UTC, whatever the session's zone is.
CREATE FUNCTION budget_used(p_tenant uuid, p_task uuid, p_measure text, p_period text, p_at timestamptz)
RETURNS TABLE (starts_at timestamptz, ends_at timestamptz, used numeric)
LANGUAGE sql STABLE SET search_path = sandbar, pg_temp AS $$
  SELECT p.starts_at, p.ends_at, COALESCE((
      SELECT sum(CASE p_measure WHEN 'fuel' THEN u.fuel WHEN 'cpu_s' THEN u.cpu_ns / 1000000000 ELSE u.attempts END)
      FROM usage u WHERE u.tenant_id = p_tenant AND (p_task IS NULL OR u.task_id = p_task)
        AND u.hour >= p.starts_at AND u.hour < p.ends_at), 0)
  FROM (SELECT s AS starts_at, CASE p_period WHEN 'day' THEN s + interval '24 hours'
      ELSE date_trunc('month', s + interval '768 hours', 'UTC') END AS ends_at
    FROM date_trunc(p_period, p_at, 'UTC') s) p
$$;

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['budgets', 'events'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY worker ON %I TO sandbar_worker USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

REVOKE EXECUTE ON FUNCTION budget_used FROM PUBLIC;
GRANT EXECUTE ON FUNCTION budget_used TO sandbar_api, sandbar_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON budgets TO sandbar_api;
GRANT SELECT ON events TO sandbar_api;
GRANT SELECT ON budgets TO sandbar_worker;
GRANT UPDATE (looked_at) ON budgets TO sandbar_worker;
GRANT SELECT, INSERT, DELETE ON events TO sandbar_worker;
