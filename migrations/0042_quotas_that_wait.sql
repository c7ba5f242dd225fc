-- Quotas that let accepted work wait: fuel and CPU seconds per day and month, by the ledger, and memory of all attempts
-- that run at once, exactly. Requests and bytes of egress per day, for workers that take some at a time. And plans, and
-- the configuration's defaults, for what stands in the tenant's row, where the queue looks for it.
--
-- Held. What has used up fuel or CPU of a period has the cap 0 until that ends, as if it were paused: by the duty that
-- adds usage up (hold_spent), so what runs goes on, and what starts before that look starts. The tenant's own row says by
-- which quota and until when.
--
-- Memory. caps.memory_cap and memory_used, in the tenant's row of scope 0, under the lock that `running` has. Invariant: memory_used =
-- the declared memory of the open lease items with flag 64. Rows are taken in order of service as far as they fit: the
-- first that does not ends it for its tenant, so that what wants much is not passed by for ever by what wants little.
-- What was accepted when more was allowed, and is larger than all that is allowed now, runs alone.

GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;

ALTER TABLE tenants
  ADD COLUMN max_memory bigint CHECK (max_memory > 0),
  ADD COLUMN held_by text,              -- a quota that is used up
  ADD COLUMN held_until timestamptz,
  ADD COLUMN by_default boolean NOT NULL DEFAULT false, -- some of what holds is the configuration's word
  ADD CHECK ((held_by IS NULL) = (held_until IS NULL));
ALTER TABLE tasks
  ADD COLUMN held_by text,
  ADD COLUMN held_until timestamptz,
  ADD CHECK ((held_by IS NULL) = (held_until IS NULL));
CREATE INDEX tenants_held ON tenants (tenant_id) WHERE held_until IS NOT NULL;
CREATE INDEX tasks_held ON tasks (tenant_id) WHERE held_until IS NOT NULL;
ALTER TABLE caps ADD COLUMN memory_cap bigint, ADD COLUMN memory_used bigint NOT NULL DEFAULT 0;

-- What the platform said of a tenant's queue stood in its row only; with plans beside it, it has to be told apart.
INSERT INTO quotas AS q (tenant_id, quotas)
  SELECT t.tenant_id, s.said FROM tenants t CROSS JOIN LATERAL (SELECT jsonb_strip_nulls(jsonb_build_object(
    'weight', NULLIF(t.weight, 100), 'queue_depth', t.max_queued, 'concurrency', t.max_concurrency,
    'retention_days', t.retention_days)) AS said) s
  WHERE s.said <> '{}'
  ON CONFLICT (tenant_id) DO UPDATE SET quotas = q.quotas || excluded.quotas;
ALTER TABLE task_quotas ADD COLUMN updated_at timestamptz NOT NULL DEFAULT clock_timestamp();
CREATE INDEX tenants_lately ON tenants (created_at);
CREATE INDEX quotas_lately ON quotas (updated_at);
CREATE INDEX quotas_of_plan ON quotas (plan) WHERE plan IS NOT NULL;
CREATE INDEX task_quotas_lately ON task_quotas (updated_at);

-- ---------------------------------------------------------------- what holds

-- What holds of a quota, from what the tenant's row of `quotas`, its plan, and the configuration say: as text, NULL: nothing said.
CREATE FUNCTION quota_said(p_own jsonb, p_plan jsonb, p_defaults jsonb, p_name text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT COALESCE(p_own ->> p_name, p_plan ->> p_name, p_defaults ->> p_name) $$;

-- The same as a bound; NULL: none.
CREATE FUNCTION quota_bound(p_said text) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT CASE p_said WHEN 'unlimited' THEN NULL ELSE p_said::bigint END $$;

-- Let the rows of these tenants say what holds for their queues and their history.
CREATE FUNCTION apply_quotas(p_tenants uuid[], p_defaults jsonb) RETURNS void
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  WITH said AS (
    SELECT w.t, quota_said(q.quotas, p.quotas, p_defaults, 'weight') AS weight, quota_said(q.quotas, p.quotas, p_defaults, 'queue_depth') AS depth,
      quota_said(q.quotas, p.quotas, p_defaults, 'concurrency') AS concurrency, quota_said(q.quotas, p.quotas, p_defaults, 'memory_bytes') AS memory,
      quota_said(q.quotas, p.quotas, p_defaults, 'retention_days') AS days,
      p_defaults ?| ARRAY['weight', 'queue_depth', 'concurrency', 'memory_bytes', 'retention_days'] AS by_default
    FROM unnest(p_tenants) w(t) LEFT JOIN quotas q ON q.tenant_id = w.t LEFT JOIN plans p ON p.name = q.plan
  ), bound AS (
    SELECT t, COALESCE(quota_bound(weight), 100)::int AS weight,
      -- The server's own bound is for those of whom nothing is said.
      CASE depth WHEN 'unlimited' THEN 1000000000 ELSE quota_bound(depth) END AS depth,
      quota_bound(concurrency)::int AS concurrency, quota_bound(memory) AS memory, quota_bound(days)::int AS days, by_default
    FROM said
  )
  UPDATE tenants x SET weight = b.weight, max_queued = b.depth, max_concurrency = b.concurrency, max_memory = b.memory,
      retention_days = b.days, by_default = b.by_default
    FROM bound b WHERE x.tenant_id = b.t
      AND (x.weight, x.max_queued, x.max_concurrency, x.max_memory, x.retention_days, x.by_default)
        IS DISTINCT FROM (b.weight, b.depth, b.concurrency, b.memory, b.days, b.by_default)
$$;

-- Hold what has used up a period's fuel or CPU seconds, and let go what has not any more: of these tenants, of all that
-- are held, and of those of whom something else has been said within the last seconds (p_all: at any time; the defaults may
-- be others now). Returns how many tenants and tasks are held now that were not, and how many were let go.
CREATE FUNCTION hold_spent(p_tenants uuid[], p_defaults jsonb, p_all boolean, OUT held int, OUT released int)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE
  -- Longer than what may pass between two looks of the duty.
  lately constant timestamptz := clock_timestamp() - interval '15 seconds';
  changed uuid[];
  who uuid[];
  h int[]; r int[];
BEGIN
  SELECT array_agg(u.t) INTO changed FROM (
    SELECT q.tenant_id FROM quotas q WHERE q.updated_at > lately
    UNION SELECT q.tenant_id FROM quotas q JOIN plans p ON p.name = q.plan WHERE p.updated_at > lately
    UNION SELECT t.tenant_id FROM tenants t WHERE t.created_at > lately AND p_defaults <> '{}'
    UNION SELECT q.tenant_id FROM quotas q WHERE p_all
    UNION SELECT t.tenant_id FROM tenants t WHERE p_all AND (t.by_default OR p_defaults <> '{}')) u(t);
  PERFORM apply_quotas(changed, p_defaults);
  SELECT array_agg(u.t) INTO who FROM (
    SELECT unnest(p_tenants) UNION SELECT unnest(changed)
    UNION SELECT k.tenant_id FROM task_quotas k WHERE k.updated_at > lately
    UNION SELECT t.tenant_id FROM tenants t WHERE t.held_until IS NOT NULL
    UNION SELECT k.tenant_id FROM tasks k WHERE k.held_until IS NOT NULL) u(t);
  IF who IS NULL THEN held := 0; released := 0; RETURN; END IF;

  WITH bound AS MATERIALIZED (
    SELECT w.t, d.*, quota_bound(quota_said(q.quotas, p.quotas, p_defaults, d.name)) AS bound
    FROM unnest(who) w(t) LEFT JOIN quotas q ON q.tenant_id = w.t LEFT JOIN plans p ON p.name = q.plan CROSS JOIN period_quotas d
  ), spent AS (
    SELECT DISTINCT ON (b.t) b.t, b.name, s.ends_at FROM (SELECT * FROM bound WHERE bound IS NOT NULL) b
    CROSS JOIN LATERAL budget_used(b.t, NULL, b.measure, b.period, clock_timestamp()) s
    WHERE s.used >= b.bound ORDER BY b.t, s.ends_at DESC, b.name
  ), moved AS (
    UPDATE tenants x SET held_by = s.name, held_until = s.ends_at
    FROM unnest(who) w(t) LEFT JOIN spent s ON s.t = w.t JOIN tenants o ON o.tenant_id = w.t
    WHERE x.tenant_id = w.t AND (x.held_by, x.held_until) IS DISTINCT FROM (s.name, s.ends_at)
    RETURNING o.held_until IS NULL AS began, s.ends_at IS NULL AS ended
  )
  SELECT array_agg(m.began::int), array_agg(m.ended::int) INTO h, r FROM moved m;
  held := COALESCE((SELECT sum(u) FROM unnest(h) u), 0); released := COALESCE((SELECT sum(u) FROM unnest(r) u), 0);

  -- The shares of tasks; a task without one any more is let go.
  WITH share AS MATERIALIZED (
    SELECT k.tenant_id, k.task_id, d.*, quota_bound(k.quotas ->> d.name) AS bound
    FROM unnest(who) w(t) JOIN task_quotas k ON k.tenant_id = w.t CROSS JOIN period_quotas d
  ), spent AS (
    SELECT DISTINCT ON (b.tenant_id, b.task_id) b.tenant_id, b.task_id, b.name, s.ends_at FROM (SELECT * FROM share WHERE bound IS NOT NULL) b
    CROSS JOIN LATERAL budget_used(b.tenant_id, b.task_id, b.measure, b.period, clock_timestamp()) s
    WHERE s.used >= b.bound ORDER BY b.tenant_id, b.task_id, s.ends_at DESC, b.name
  ), moved AS (
    UPDATE tasks x SET held_by = s.name, held_until = s.ends_at
    FROM (SELECT k.tenant_id, k.task_id FROM share k UNION
          SELECT k.tenant_id, k.task_id FROM tasks k WHERE k.tenant_id = ANY (who) AND k.held_until IS NOT NULL) w
    LEFT JOIN spent s ON s.tenant_id = w.tenant_id AND s.task_id = w.task_id
    JOIN tasks o ON o.tenant_id = w.tenant_id AND o.task_id = w.task_id
    WHERE x.tenant_id = w.tenant_id AND x.task_id = w.task_id AND (x.held_by, x.held_until) IS DISTINCT FROM (s.name, s.ends_at)
    RETURNING o.held_until IS NULL AS began, s.ends_at IS NULL AS ended
  )
  SELECT array_agg(m.began::int), array_agg(m.ended::int) INTO h, r FROM moved m;
  held := held + COALESCE((SELECT sum(u) FROM unnest(h) u), 0); released := released + COALESCE((SELECT sum(u) FROM unnest(r) u), 0);
END $$;

-- The quotas of a period: what they bound in the ledger (budget_used).
CREATE VIEW period_quotas AS
  SELECT m.name || '_per_' || p.period AS name, m.measure, p.period
  FROM (VALUES ('fuel', 'fuel'), ('cpu_s', 'cpu_s')) m(name, measure) CROSS JOIN (VALUES ('day'), ('month')) p(period);

-- Fold up to p_limit rows of usage_deltas into usage_hours. Returns how many, and whose they were.
DROP FUNCTION fold_usage;
CREATE FUNCTION fold_usage(p_limit int, OUT folded bigint, OUT tenants uuid[])
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  WITH picked AS (
    SELECT tenant_id, delta_id FROM usage_deltas ORDER BY tenant_id, delta_id LIMIT p_limit FOR UPDATE SKIP LOCKED
  ), gone AS (
    DELETE FROM usage_deltas d USING picked p WHERE d.tenant_id = p.tenant_id AND d.delta_id = p.delta_id RETURNING d.*
  ), added AS (
    INSERT INTO usage_hours AS h (tenant_id, task_id, hour, attempts, succeeded, fuel, cpu_ns, wall_ns, input_bytes, output_bytes, log_bytes, egress_bytes)
    SELECT tenant_id, task_id, hour, sum(attempts), sum(succeeded), sum(fuel), sum(cpu_ns), sum(wall_ns), sum(input_bytes), sum(output_bytes),
      sum(log_bytes), sum(egress_bytes)
    FROM gone GROUP BY tenant_id, task_id, hour ORDER BY tenant_id, task_id, hour
    ON CONFLICT (tenant_id, task_id, hour) DO UPDATE SET attempts = h.attempts + excluded.attempts, succeeded = h.succeeded + excluded.succeeded,
      fuel = h.fuel + excluded.fuel, cpu_ns = h.cpu_ns + excluded.cpu_ns, wall_ns = h.wall_ns + excluded.wall_ns,
      input_bytes = h.input_bytes + excluded.input_bytes, output_bytes = h.output_bytes + excluded.output_bytes,
      log_bytes = h.log_bytes + excluded.log_bytes, egress_bytes = h.egress_bytes + excluded.egress_bytes
  )
  SELECT count(*), COALESCE(array_agg(DISTINCT tenant_id), '{}') FROM gone
$$;

-- ---------------------------------------------------------------- gates

-- As 0014 made it, with what is held. A tenant that is suspended or going has no turn (ready_tenants); with the cap 0 a
-- worker that remembers it gets nothing either.
CREATE OR REPLACE FUNCTION cap_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF TG_TABLE_NAME = 'tenants' THEN
    PERFORM set_cap(NEW.tenant_id, 0::smallint, '00000000-0000-0000-0000-000000000000',
      CASE WHEN NEW.paused OR NEW.held_until IS NOT NULL OR NEW.state <> 'active' THEN 0 ELSE NEW.max_concurrency END);
  ELSE
    PERFORM set_cap(NEW.tenant_id, 1::smallint, NEW.task_id,
      CASE WHEN NEW.active AND NOT NEW.paused AND NEW.held_until IS NULL THEN NEW.max_concurrency ELSE 0 END);
  END IF;
  RETURN NULL;
END $$;
SELECT set_cap(t.tenant_id, 0::smallint, '00000000-0000-0000-0000-000000000000', 0) FROM tenants t WHERE t.state <> 'active';
CREATE TRIGGER cap_held AFTER UPDATE OF held_until, state ON tenants FOR EACH ROW
  WHEN ((OLD.held_until IS NULL, OLD.state = 'active') IS DISTINCT FROM (NEW.held_until IS NULL, NEW.state = 'active'))
  EXECUTE FUNCTION cap_changed();
CREATE TRIGGER cap_held AFTER UPDATE OF held_until ON tasks FOR EACH ROW
  WHEN ((OLD.held_until IS NULL) IS DISTINCT FROM (NEW.held_until IS NULL)) EXECUTE FUNCTION cap_changed();

-- What an attempt of an invocation declares, in bytes: limits are written in order and without their names, and not at all
-- where they are the defaults (src/store/invocation.rs).
CREATE FUNCTION declared_memory(p_spec jsonb) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT COALESCE(p_spec #>> '{limits,1}', p_spec #>> '{limits,memory_bytes}', '67108864')::bigint $$;

-- Set how much memory the attempts of a tenant may declare together; NULL: any. When it begins to be counted, what runs
-- now is counted and marked so, as set_cap does.
CREATE FUNCTION memory_cap_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  used bigint;
BEGIN
  PERFORM pg_advisory_xact_lock(7260002);
  IF NEW.max_memory IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM caps c WHERE c.tenant_id = NEW.tenant_id AND c.scope = 0 AND c.memory_cap IS NOT NULL) THEN
    PERFORM 1 FROM leases l WHERE NEW.tenant_id = ANY (l.tenants) ORDER BY l.lease_id FOR UPDATE;
    WITH item AS (
      SELECT l.lease_id, u.o, declared_memory(i.spec) AS bytes, u.tenant_id = NEW.tenant_id AND NOT EXISTS (SELECT 1 FROM attempts a
          WHERE a.tenant_id = u.tenant_id AND a.invocation_id = u.invocation_id AND a.attempt = u.attempt) AS runs, COALESCE(u.flags, 0) AS flags
      FROM leases l
      CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts, l.flags) WITH ORDINALITY AS u(tenant_id, invocation_id, attempt, flags, o)
      JOIN invocations i ON i.tenant_id = u.tenant_id AND i.invocation_id = u.invocation_id
      WHERE NEW.tenant_id = ANY (l.tenants)
    ), marked AS (
      UPDATE leases l SET flags = m.flags
      FROM (SELECT lease_id, array_agg((CASE WHEN runs THEN flags | 64 ELSE flags END)::smallint ORDER BY o) AS flags FROM item GROUP BY lease_id) m
      WHERE l.lease_id = m.lease_id
    )
    SELECT COALESCE(sum(bytes) FILTER (WHERE runs), 0) INTO used FROM item;
    INSERT INTO caps AS c (tenant_id, scope, memory_cap, memory_used) VALUES (NEW.tenant_id, 0, NEW.max_memory, used)
      ON CONFLICT (tenant_id, scope, task_id, key) DO UPDATE SET memory_cap = excluded.memory_cap, memory_used = excluded.memory_used;
  ELSE
    UPDATE caps c SET memory_cap = NEW.max_memory WHERE c.tenant_id = NEW.tenant_id AND c.scope = 0;
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER memory_cap_set AFTER INSERT ON tenants FOR EACH ROW WHEN (NEW.max_memory IS NOT NULL) EXECUTE FUNCTION memory_cap_changed();
CREATE TRIGGER memory_cap_changed AFTER UPDATE OF max_memory ON tenants FOR EACH ROW
  WHEN (OLD.max_memory IS DISTINCT FROM NEW.max_memory) EXECUTE FUNCTION memory_cap_changed();

-- Of picked rows of `ready`, in order of service: those whose memory fits beside what runs of their tenants. p_rooms[i]: of p_tenants[i]; NULL: any. A tenant of which nothing runs has room for one.
CREATE FUNCTION fit_memory(p_t uuid[], p_k timestamptz[], p_i uuid[], p_tenants uuid[], p_rooms bigint[], p_idle boolean[], OUT fit int[])
LANGUAGE sql STABLE SET search_path = sandbar, pg_temp AS $$
  WITH item AS (
    SELECT u.o::int AS o, r.room, r.idle,
      sum(declared_memory(v.spec)) OVER w AS so_far, row_number() OVER w AS place
    FROM unnest(p_t, p_k, p_i) WITH ORDINALITY u(t, k, i, o)
    JOIN unnest(p_tenants, p_rooms, p_idle) r(t, room, idle) ON r.t = u.t
    JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i
    WINDOW w AS (PARTITION BY u.t ORDER BY u.k, u.i)
  )
  SELECT array_agg(o ORDER BY o) FROM item
  WHERE room IS NULL OR so_far <= room OR (idle AND place = 1)
$$;

CREATE OR REPLACE FUNCTION pg_temp.edit(p_function regproc, p_from text, p_to text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  body text := pg_get_functiondef(p_function);
BEGIN
  IF (length(body) - length(replace(body, p_from, ''))) / length(p_from) <> 1 THEN
    RAISE EXCEPTION '% does not say this once: %', p_function, p_from;
  END IF;
  EXECUTE replace(body, p_from, p_to);
END $$;

SELECT pg_temp.edit('claim', $$  capped boolean;
$$, $$  capped boolean;
  weighed boolean;
  rooms bigint[];                      -- bytes of memory left; NULL: any
  idle boolean[];                      -- nothing of the tenant is counted
$$);
SELECT pg_temp.edit('claim',
$$  SELECT COALESCE(bool_or(x.cap IS NOT NULL), false), COALESCE(bool_or(x.gated), false) INTO capped, gated
    FROM$$,
$$  SELECT COALESCE(bool_or(x.cap IS NOT NULL OR x.memory_cap IS NOT NULL), false), COALESCE(bool_or(x.gated), false),
      COALESCE(bool_or(x.memory_cap IS NOT NULL), false) INTO capped, gated, weighed
    FROM$$);
SELECT pg_temp.edit('claim',
$$      SELECT x.tenant_id, x.cap - x.running AS free FROM caps x
      WHERE x.tenant_id = ANY (p_tenants) AND x.scope = 0 AND x.cap IS NOT NULL ORDER BY x.tenant_id FOR UPDATE
    )
    SELECT array_agg(GREATEST(LEAST(u.n, l.free), 0) ORDER BY u.o) INTO wanted
$$,
$$      SELECT x.tenant_id, x.cap - x.running AS free, x.memory_cap - x.memory_used AS room, x.memory_used = 0 AS idle FROM caps x
      WHERE x.tenant_id = ANY (p_tenants) AND x.scope = 0 AND (x.cap IS NOT NULL OR x.memory_cap IS NOT NULL) ORDER BY x.tenant_id FOR UPDATE
    )
    SELECT array_agg(GREATEST(LEAST(u.n, l.free), 0) ORDER BY u.o), array_agg(l.room ORDER BY u.o), array_agg(l.idle ORDER BY u.o)
      INTO wanted, rooms, idle
$$);
SELECT pg_temp.edit('claim',
$$    EXIT WHEN t IS NULL;
    blocked := 0;
$$,
$$    EXIT WHEN t IS NULL;
    IF weighed THEN
      SELECT m.fit INTO fit FROM fit_memory(t, k, i, p_tenants, rooms, idle) m;
      EXIT WHEN fit IS NULL;
      SELECT array_agg(t[o]), array_agg(k[o]), array_agg(i[o]), array_agg(a[o]), array_agg(s[o]), array_agg(f[o]), array_agg(c[o])
        INTO t, k, i, a, s, f, c FROM unnest(fit) o;
    END IF;
    blocked := 0;
$$);
SELECT pg_temp.edit('claim',
$$          FROM unnest(p_tenants, wanted) WITH ORDINALITY w(tenant, n, o);
      END IF;
$$,
$$          FROM unnest(p_tenants, wanted) WITH ORDINALITY w(tenant, n, o);
      END IF;
      IF weighed AND blocked > 0 THEN
        SELECT array_agg(r.room - COALESCE(m.bytes, 0) ORDER BY r.o), array_agg(r.idle AND m.bytes IS NULL ORDER BY r.o) INTO rooms, idle
          FROM unnest(p_tenants, rooms, idle) WITH ORDINALITY r(tenant, room, idle, o)
          LEFT JOIN (SELECT v.tenant_id, sum(declared_memory(v.spec)) AS bytes FROM unnest(t, i) u(t, i)
            JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i GROUP BY 1) m ON m.tenant_id = r.tenant;
      END IF;
$$);
SELECT pg_temp.edit('claim',
$$    SELECT array_agg(u.f | CASE WHEN x.cap IS NULL THEN 0 ELSE 1 END::smallint ORDER BY u.o) INTO all_f
$$,
$$    IF weighed THEN
      UPDATE caps x SET memory_used = x.memory_used + n.bytes
        FROM (SELECT v.tenant_id, sum(declared_memory(v.spec)) AS bytes FROM unnest(all_t, all_i) u(t, i)
          JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i GROUP BY 1) n
        WHERE x.tenant_id = n.tenant_id AND x.scope = 0 AND x.memory_cap IS NOT NULL;
    END IF;
    SELECT array_agg((u.f | CASE WHEN x.cap IS NULL THEN 0 ELSE 1 END | CASE WHEN x.memory_cap IS NULL THEN 0 ELSE 64 END)::smallint ORDER BY u.o)
      INTO all_f
$$);

SELECT pg_temp.edit('release_slots',
$$    SELECT c.tenant_id, c.scope, c.task_id, c.key, c.n FROM (
      SELECT u.t AS tenant_id, 0::smallint AS scope, '00000000-0000-0000-0000-000000000000'::uuid AS task_id, '' AS key, count(*)::int AS n
        FROM unnest(p_tenants, p_flags) u(t, f) WHERE u.f & 1 <> 0 GROUP BY 1
      UNION ALL
      SELECT u.t, s.scope, i.task_id, CASE s.scope WHEN 2 THEN i.concurrency_key ELSE '' END, count(*)::int
$$,
$$    SELECT c.tenant_id, c.scope, c.task_id, c.key, c.n, c.bytes FROM (
      SELECT u.t AS tenant_id, 0::smallint AS scope, '00000000-0000-0000-0000-000000000000'::uuid AS task_id, '' AS key,
          count(*) FILTER (WHERE u.f & 1 <> 0)::int AS n, COALESCE(sum(m.bytes), 0)::bigint AS bytes
        FROM unnest(p_tenants, p_invocations, p_flags) u(t, id, f)
        LEFT JOIN LATERAL (SELECT declared_memory(i.spec) AS bytes FROM invocations i
          WHERE u.f & 64 <> 0 AND i.tenant_id = u.t AND i.invocation_id = u.id) m ON true
        WHERE u.f & 65 <> 0 GROUP BY 1
      UNION ALL
      SELECT u.t, s.scope, i.task_id, CASE s.scope WHEN 2 THEN i.concurrency_key ELSE '' END, count(*)::int, 0
$$);
SELECT pg_temp.edit('release_slots', 'UPDATE caps c SET running = c.running - g.n', 'UPDATE caps c SET running = c.running - g.n, memory_used = c.memory_used - g.bytes');
SELECT pg_temp.edit('ack', 'WHERE u.ok AND u.f & 7 <> 0', 'WHERE u.ok AND u.f & 71 <> 0');

-- As 0015 made it; a tenant whose next invocation has no room in its memory is left out too.
CREATE OR REPLACE FUNCTION ready_tenants(p_limit int) RETURNS TABLE (tenant_id uuid, weight int, free int)
LANGUAGE sql STABLE SET search_path = sandbar, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
  WITH RECURSIVE jump AS (
    (SELECT r.tenant_id, 1 AS n FROM ready r ORDER BY r.tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.tenant_id FROM ready r WHERE r.tenant_id > j.tenant_id ORDER BY r.tenant_id LIMIT 1), j.n + 1
    FROM jump j WHERE j.tenant_id IS NOT NULL AND j.n < p_limit
  )
  SELECT t.tenant_id, t.weight, c.cap - c.running
  FROM jump j JOIN tenants t ON t.tenant_id = j.tenant_id
  LEFT JOIN caps c ON c.tenant_id = t.tenant_id AND c.scope = 0
  WHERE (c.cap IS NULL OR c.running < c.cap) AND t.state = 'active'
    AND (c.memory_cap IS NULL OR c.memory_used = 0 OR EXISTS (
      SELECT 1 FROM (SELECT r.invocation_id FROM ready r WHERE r.tenant_id = t.tenant_id ORDER BY r.rank, r.invocation_id LIMIT 1) h
      JOIN invocations i ON i.tenant_id = t.tenant_id AND i.invocation_id = h.invocation_id
      WHERE c.memory_used + declared_memory(i.spec) <= c.memory_cap))
$$;

-- ---------------------------------------------------------------- windows

-- take_quota of 0017, of a tenant that is named.
CREATE FUNCTION take_quota_of(p_tenant uuid, p_task uuid, p_quota text, p_window interval, p_limit bigint, p_want bigint,
  p_back bigint, p_back_window timestamptz)
RETURNS TABLE (granted bigint, used bigint, window_start timestamptz, ends_in_ms bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  q record;
  before bigint;
BEGIN
  window_start := date_bin(p_window, clock_timestamp(), 'epoch');
  INSERT INTO quota_windows (tenant_id, task_id, quota, starts_at, used) VALUES (p_tenant, p_task, p_quota, window_start, 0)
    ON CONFLICT DO NOTHING;
  SELECT w.starts_at, w.used INTO q FROM quota_windows w
    WHERE w.tenant_id = p_tenant AND w.task_id = p_task AND w.quota = p_quota FOR UPDATE;
  -- Looked at after the wait for the lock: a window may have begun meanwhile.
  window_start := date_bin(p_window, clock_timestamp(), 'epoch');
  before := CASE
    WHEN q.starts_at <> window_start THEN 0
    WHEN p_back_window = window_start THEN GREATEST(q.used - p_back, 0)
    ELSE q.used END;
  granted := GREATEST(LEAST(p_want, p_limit - before), 0);
  used := before + granted;
  UPDATE quota_windows w SET starts_at = window_start, used = before + granted
    WHERE w.tenant_id = p_tenant AND w.task_id = p_task AND w.quota = p_quota;
  ends_in_ms := GREATEST(ceil(extract(epoch FROM window_start + p_window - clock_timestamp()) * 1000), 1)::bigint;
  RETURN NEXT;
END $$;
CREATE OR REPLACE FUNCTION take_quota(p_task uuid, p_quota text, p_window interval, p_limit bigint, p_want bigint,
  p_back bigint, p_back_window timestamptz)
RETURNS TABLE (granted bigint, used bigint, window_start timestamptz, ends_in_ms bigint)
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  SELECT * FROM take_quota_of(current_tenant(), p_task, p_quota, p_window, p_limit, p_want, p_back, p_back_window)
$$;

-- For a worker: take of a quota per day of a tenant (p_task nil) or of the share that one of its tasks has. bound NULL:
-- there is no bound, and nothing was counted.
CREATE FUNCTION take_quota_per_day(p_tenant uuid, p_task uuid, p_quota text, p_default bigint, p_want bigint, p_back bigint, p_back_window timestamptz,
  OUT bound bigint, OUT granted bigint, OUT used bigint, OUT window_start timestamptz, OUT ends_in_ms bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
BEGIN
  bound := quota_bound(CASE WHEN p_task = '00000000-0000-0000-0000-000000000000'
    THEN (SELECT quota_said(q.quotas, p.quotas, jsonb_build_object(p_quota, p_default), p_quota)
      FROM (SELECT p_tenant AS t) o LEFT JOIN quotas q ON q.tenant_id = o.t LEFT JOIN plans p ON p.name = q.plan)
    ELSE (SELECT k.quotas ->> p_quota FROM task_quotas k WHERE k.tenant_id = p_tenant AND k.task_id = p_task) END);
  IF bound IS NULL THEN RETURN; END IF;
  SELECT w.granted, w.used, w.window_start, w.ends_in_ms INTO granted, used, window_start, ends_in_ms
    FROM take_quota_of(p_tenant, p_task, p_quota, interval '1 day', bound, p_want, p_back, p_back_window) w;
END $$;

-- ---------------------------------------------------------------- who may what

REVOKE EXECUTE ON FUNCTION quota_said, quota_bound, apply_quotas, hold_spent, fold_usage, declared_memory, memory_cap_changed, fit_memory,
  take_quota_of, take_quota_per_day FROM PUBLIC;
GRANT EXECUTE ON FUNCTION quota_said, quota_bound, apply_quotas, take_quota_of, declared_memory TO sandbar_api;
GRANT EXECUTE ON FUNCTION quota_said, quota_bound, apply_quotas, hold_spent, fold_usage, declared_memory, fit_memory, take_quota_of,
  take_quota_per_day TO sandbar_worker;
GRANT EXECUTE ON FUNCTION declared_memory TO sandbar_definer;
GRANT SELECT ON period_quotas TO sandbar_worker;
GRANT UPDATE (max_memory, retention_days, by_default) ON tenants TO sandbar_api;
GRANT UPDATE (weight, max_queued, max_concurrency, max_memory, retention_days, by_default, held_by, held_until) ON tenants TO sandbar_worker;
GRANT UPDATE (held_by, held_until) ON tasks TO sandbar_worker;
GRANT SELECT, INSERT, UPDATE ON quota_windows TO sandbar_worker;
ALTER FUNCTION memory_cap_changed OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
