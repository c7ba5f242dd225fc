-- What a tenant may use: plans of the platform, overrides of a tenant, shares of its tasks; and how much of a quota per
-- second or day is used, counted for all servers together.
--
-- Quotas are texts to SQL: src/domain/quota.rs has the list with units, ranges and what happens when one is hit.
-- A value is a number, or the text 'unlimited'; what is absent is inherited: task < tenant < plan < configuration.

CREATE TABLE plans (
  name       text PRIMARY KEY CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
  quotas     jsonb NOT NULL CHECK (jsonb_typeof(quotas) = 'object'),
  updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE quotas (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  plan       text REFERENCES plans,
  quotas     jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(quotas) = 'object'),
  updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id)
);

-- Shares that a tenant gives its own tasks; the tenant's quota holds besides.
CREATE TABLE task_quotas (
  tenant_id  uuid NOT NULL,
  task_id    uuid NOT NULL,
  quotas     jsonb NOT NULL CHECK (jsonb_typeof(quotas) = 'object'),
  PRIMARY KEY (tenant_id, task_id),
  FOREIGN KEY (tenant_id, task_id) REFERENCES tasks
);

-- What is used of a quota in its current window, by servers that take some at a time. One row for each, for good: a new
-- window begins in place.
CREATE TABLE quota_windows (
  tenant_id uuid NOT NULL,
  task_id   uuid NOT NULL,             -- nil: the tenant as a whole
  quota     text NOT NULL,
  starts_at timestamptz NOT NULL,
  used      bigint NOT NULL CHECK (used >= 0),
  PRIMARY KEY (tenant_id, task_id, quota)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

-- Take up to p_want of a quota of this session's tenant in the current window, and give back p_back that were taken in
-- the window that began at p_back_window. Never passes p_limit, whoever asks at the same time. Windows are of the
-- database's clock, in UTC, aligned to midnight.
CREATE FUNCTION take_quota(p_task uuid, p_quota text, p_window interval, p_limit bigint, p_want bigint,
  p_back bigint, p_back_window timestamptz)
RETURNS TABLE (granted bigint, used bigint, window_start timestamptz, ends_in_ms bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  t uuid := current_tenant();
  q record;
  before bigint;
BEGIN
  window_start := date_bin(p_window, clock_timestamp(), 'epoch');
  INSERT INTO quota_windows (tenant_id, task_id, quota, starts_at, used) VALUES (t, p_task, p_quota, window_start, 0)
    ON CONFLICT DO NOTHING;
  SELECT w.starts_at, w.used INTO q FROM quota_windows w
    WHERE w.tenant_id = t AND w.task_id = p_task AND w.quota = p_quota FOR UPDATE;
  -- Looked at after the wait for the lock: a window may have begun meanwhile.
  window_start := date_bin(p_window, clock_timestamp(), 'epoch');
  before := CASE
    WHEN q.starts_at <> window_start THEN 0
    WHEN p_back_window = window_start THEN GREATEST(q.used - p_back, 0)
    ELSE q.used END;
  granted := GREATEST(LEAST(p_want, p_limit - before), 0);
  used := before + granted;
  UPDATE quota_windows w SET starts_at = window_start, used = before + granted
    WHERE w.tenant_id = t AND w.task_id = p_task AND w.quota = p_quota;
  ends_in_ms := GREATEST(ceil(extract(epoch FROM window_start + p_window - clock_timestamp()) * 1000), 1)::bigint;
  RETURN NEXT;
END $$;

-- The id of a tenant by its name or id: for the platform, which looks at tenants that are not its own. One whose time is
-- over is not there any more (0015).
CREATE FUNCTION tenant_named(p_name text) RETURNS uuid
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT tenant_id FROM tenants
  WHERE (name = p_name OR tenant_id::text = p_name) AND (delete_after IS NULL OR delete_after > clock_timestamp())
$$;

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['quotas', 'task_quotas', 'quota_windows'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY worker ON %I TO sandbar_worker USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY definer ON %I TO sandbar_definer USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

REVOKE EXECUTE ON FUNCTION take_quota, tenant_named FROM PUBLIC;
GRANT EXECUTE ON FUNCTION take_quota, tenant_named TO sandbar_api;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION tenant_named OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;

GRANT SELECT, INSERT, UPDATE ON plans, quotas, task_quotas, quota_windows TO sandbar_api;
GRANT DELETE ON plans, task_quotas TO sandbar_api;
GRANT SELECT ON plans, quotas, task_quotas TO sandbar_worker;
GRANT UPDATE (weight, max_queued, max_concurrency) ON tenants TO sandbar_api;
