-- The queue protocol, whole: order of service with aging, exact caps with parking, unique keys, concurrency keys,
-- dependencies, the usage ledger, late acks. Replaces every function of the protocol that 0001 made, and
-- change_invocation of 0002.
--
-- Places. An invocation is in exactly one of: `scheduled` (due_at ahead, or NULL: waits for dependencies), `ready`,
-- `parked` (ready, but a gate is shut), an item of a lease, `results`.
--
-- Order of service. ready.rank is a time: GREATEST(created_at, run_at) - priority minutes (function rank_of). One
-- ascending order serves old and important work first, and a row of low priority is overtaken by younger ones for a
-- bounded time only: aging costs nothing, because it is in the key.
--
-- Caps. `caps` has one row per thing that is counted: a tenant (scope 0), a task (scope 1), a concurrency key of a
-- task (scope 2). Invariant: running = the number of open lease items that were charged to it. Which were, the flags
-- of the item in its lease say; so what was claimed before a thing was counted is never given back. `running` is
-- raised in the claim's transaction and lowered in the ack's or the reaper's, under the lock of the row: exact with
-- any number of workers, and after any crash.
--   * A tenant at its cap is not asked for (ready_tenants) and gets nothing (claim).
--   * A row that a task's or key's cap keeps out is moved from `ready` to `parked` by the claim that meets it, so that
--     it is met once and not by every claim. Whoever frees a slot moves the oldest parked rows of that gate back in
--     the same transaction; the duty `unpark` repairs what a cancellation of such a row leaves behind.
--   * A task that is not active is a task with the cap 0.
--   * caps.gated of a tenant's row: some task of it has, or had, a gate. Without it, and without flag 32 on a row, a
--     claim looks at no gate.
--
-- Lock order, everywhere: workers, leases (by id), caps (by scope, tenant, task, key), unique_keys (by key),
-- scheduled (by id). Rows of ready, parked and ended are taken with SKIP LOCKED or waited for with nothing else held.
-- Advisory lock 7260002: shared by every claim; exclusive while something begins to be counted, so that no claim under
-- way is missed.
--
-- Dependencies. A row of `dependencies` per dependant and invocation depended on. An end that has dependants writes a
-- row to `ended` in its own transaction and settles it there as far as its bound goes; the duty does the rest. An
-- enqueue may miss an end that is being committed, and that end may miss the new row: so the enqueue too leaves a row
-- in `ended`, and `settle` drops it only when every transaction that could have missed it is over (fence).

GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;

-- ---------------------------------------------------------------- columns

ALTER TABLE tenants ADD COLUMN IF NOT EXISTS max_concurrency int CHECK (max_concurrency > 0);
ALTER TABLE tasks ADD COLUMN IF NOT EXISTS max_concurrency int CHECK (max_concurrency > 0);
ALTER TABLE tasks ADD COLUMN IF NOT EXISTS active boolean NOT NULL DEFAULT true;
ALTER TABLE invocations ADD COLUMN concurrency_key text, ADD COLUMN concurrency_limit int CHECK (concurrency_limit > 0);

-- Flags of an invocation on its way: 8 has a unique key, 16 has an expiry, 32 has a concurrency key. In a lease also
-- what it was charged to: 1 tenant, 2 task, 4 concurrency key. '{}' in a lease: no item of it has any.
ALTER TABLE ready ADD COLUMN flags smallint NOT NULL DEFAULT 0;
ALTER TABLE scheduled ADD COLUMN flags smallint NOT NULL DEFAULT 0;
ALTER TABLE scheduled ALTER COLUMN due_at DROP NOT NULL;
ALTER TABLE leases ADD COLUMN flags smallint[] NOT NULL DEFAULT '{}';

-- When an invocation's turn comes, before others with a later turn. STABLE, so that it is inlined.
CREATE FUNCTION rank_of(p_created_at timestamptz, p_run_at timestamptz, p_priority int) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
AS $$ SELECT GREATEST(p_created_at, p_run_at) - p_priority * interval '1 minute' $$;

ALTER TABLE ready ALTER COLUMN rank TYPE timestamptz USING now();
ALTER TABLE scheduled ALTER COLUMN rank TYPE timestamptz USING now();
UPDATE ready r SET rank = rank_of(i.created_at, i.run_at, i.priority),
    flags = CASE WHEN i.expires_at IS NULL THEN 0 ELSE 16 END
  FROM invocations i WHERE i.tenant_id = r.tenant_id AND i.invocation_id = r.invocation_id;
UPDATE scheduled s SET rank = rank_of(i.created_at, i.run_at, i.priority),
    flags = CASE WHEN i.expires_at IS NULL THEN 0 ELSE 16 END
  FROM invocations i WHERE i.tenant_id = s.tenant_id AND i.invocation_id = s.invocation_id;

-- ---------------------------------------------------------------- tables

CREATE TABLE caps (
  tenant_id uuid NOT NULL REFERENCES tenants,
  scope     smallint NOT NULL CHECK (scope BETWEEN 0 AND 2), -- 0 tenant, 1 task, 2 concurrency key
  task_id   uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
  key       text NOT NULL DEFAULT '',
  cap       int,                       -- NULL: none. Of a key: always NULL, each invocation brings its own
  running   int NOT NULL DEFAULT 0 CHECK (running >= 0),
  gated     boolean NOT NULL DEFAULT false,
  PRIMARY KEY (tenant_id, scope, task_id, key)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

CREATE TABLE parked (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  scope         smallint NOT NULL,     -- which gate: 1 the task's, 2 the key's
  task_id       uuid NOT NULL,
  key           text NOT NULL,
  rank          timestamptz NOT NULL,
  attempt       smallint NOT NULL,
  spent         smallint NOT NULL,
  flags         smallint NOT NULL,
  PRIMARY KEY (tenant_id, invocation_id)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX parked_gate ON parked (tenant_id, scope, task_id, key, rank, invocation_id);

-- At most one unfinished invocation holds a key. An end gives it back; a holder that has a result holds nothing.
CREATE TABLE unique_keys (
  tenant_id     uuid NOT NULL,
  task_id       uuid NOT NULL,
  key           text NOT NULL,
  invocation_id uuid NOT NULL,
  PRIMARY KEY (tenant_id, task_id, key)
);
CREATE INDEX unique_keys_holder ON unique_keys (tenant_id, invocation_id);

CREATE TABLE dependencies (
  tenant_id     uuid NOT NULL,
  on_id         uuid NOT NULL,         -- the invocation depended on
  invocation_id uuid NOT NULL,         -- the one that waits
  condition     text NOT NULL CHECK (condition IN ('succeeded', 'finished', 'failed')),
  cancels       boolean NOT NULL,      -- what an unmet condition does: true cancels, false lets it run
  PRIMARY KEY (tenant_id, on_id, invocation_id)
);
CREATE INDEX dependencies_waiting ON dependencies (tenant_id, invocation_id);

CREATE TABLE ended (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  fence         xid8,                  -- NULL: not looked at yet
  PRIMARY KEY (tenant_id, invocation_id)
);

-- What attempts cost, per tenant, task and hour (UTC). Acks append to usage_deltas, so that no two of them wait for
-- each other; a duty folds. The sum of both is right at any time: the view `usage`.
CREATE TABLE usage_hours (
  tenant_id uuid NOT NULL, task_id uuid NOT NULL, hour timestamptz NOT NULL,
  attempts bigint NOT NULL, succeeded bigint NOT NULL, fuel numeric NOT NULL, cpu_ns numeric NOT NULL, wall_ns numeric NOT NULL,
  input_bytes numeric NOT NULL, output_bytes numeric NOT NULL, log_bytes numeric NOT NULL, egress_bytes numeric NOT NULL,
  PRIMARY KEY (tenant_id, task_id, hour)
);
CREATE TABLE usage_deltas (
  tenant_id uuid NOT NULL, delta_id bigint GENERATED ALWAYS AS IDENTITY, task_id uuid NOT NULL, hour timestamptz NOT NULL,
  attempts bigint NOT NULL, succeeded bigint NOT NULL, fuel numeric NOT NULL, cpu_ns numeric NOT NULL, wall_ns numeric NOT NULL,
  input_bytes numeric NOT NULL, output_bytes numeric NOT NULL, log_bytes numeric NOT NULL, egress_bytes numeric NOT NULL,
  PRIMARY KEY (tenant_id, delta_id)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
CREATE VIEW usage WITH (security_invoker = true) AS
  SELECT tenant_id, task_id, hour, sum(attempts)::bigint AS attempts, sum(succeeded)::bigint AS succeeded, sum(fuel) AS fuel,
    sum(cpu_ns) AS cpu_ns, sum(wall_ns) AS wall_ns, sum(input_bytes) AS input_bytes, sum(output_bytes) AS output_bytes,
    sum(log_bytes) AS log_bytes, sum(egress_bytes) AS egress_bytes
  FROM (SELECT tenant_id, task_id, hour, attempts, succeeded, fuel, cpu_ns, wall_ns, input_bytes, output_bytes, log_bytes, egress_bytes
          FROM usage_hours
        UNION ALL
        SELECT tenant_id, task_id, hour, attempts, succeeded, fuel, cpu_ns, wall_ns, input_bytes, output_bytes, log_bytes, egress_bytes
          FROM usage_deltas) u
  GROUP BY tenant_id, task_id, hour;

-- Ends that came after their lease was lost and changed nothing. Rare, so a row each time.
CREATE TABLE late_acks (
  worker_id uuid NOT NULL,
  at        timestamptz NOT NULL DEFAULT clock_timestamp(),
  items     int NOT NULL
);
CREATE INDEX late_acks_at ON late_acks (at);

-- Where ready work waits, whichever the gate.
CREATE VIEW queued WITH (security_invoker = true) AS
  SELECT tenant_id, rank, invocation_id, attempt, spent, flags, NULL::smallint AS gate FROM ready
  UNION ALL
  SELECT tenant_id, rank, invocation_id, attempt, spent, flags, scope FROM parked;

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['caps', 'parked', 'unique_keys', 'dependencies', 'ended', 'usage_hours', 'usage_deltas'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY worker ON %I TO sandbar_worker USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY definer ON %I TO sandbar_definer USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

DROP FUNCTION enqueue, claim, ack, cancel_invocation, promote, expire, reap, ready_tenants;

-- ---------------------------------------------------------------- ends and slots

-- Take one invocation out of its waiting place. Without p_wait, a row that somebody moves right now is left to them.
-- False: it is in none of them (it runs, is being moved, or has ended).
CREATE FUNCTION unqueue(p_tenant uuid, p_invocation uuid, p_rank timestamptz, p_wait boolean) RETURNS boolean
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
BEGIN
  -- In the order of moves, `ready` twice: what a claim parked or a freed slot brought back meanwhile is met again.
  IF NOT p_wait THEN
    PERFORM 1 FROM scheduled WHERE tenant_id = p_tenant AND invocation_id = p_invocation FOR UPDATE SKIP LOCKED;
    IF FOUND THEN DELETE FROM scheduled WHERE tenant_id = p_tenant AND invocation_id = p_invocation; RETURN true; END IF;
    PERFORM 1 FROM ready WHERE tenant_id = p_tenant AND rank = p_rank AND invocation_id = p_invocation FOR UPDATE SKIP LOCKED;
    IF FOUND THEN DELETE FROM ready WHERE tenant_id = p_tenant AND rank = p_rank AND invocation_id = p_invocation; RETURN true; END IF;
    PERFORM 1 FROM parked WHERE tenant_id = p_tenant AND invocation_id = p_invocation FOR UPDATE SKIP LOCKED;
    IF FOUND THEN DELETE FROM parked WHERE tenant_id = p_tenant AND invocation_id = p_invocation; RETURN true; END IF;
    RETURN false;
  END IF;
  DELETE FROM scheduled WHERE tenant_id = p_tenant AND invocation_id = p_invocation;
  IF FOUND THEN RETURN true; END IF;
  DELETE FROM ready WHERE tenant_id = p_tenant AND rank = p_rank AND invocation_id = p_invocation;
  IF FOUND THEN RETURN true; END IF;
  DELETE FROM parked WHERE tenant_id = p_tenant AND invocation_id = p_invocation;
  IF FOUND THEN RETURN true; END IF;
  DELETE FROM ready WHERE tenant_id = p_tenant AND rank = p_rank AND invocation_id = p_invocation;
  RETURN FOUND;
END $$;

-- What every end does besides its result: give back key and expiry, forget the wish for cancellation, and note the end
-- for those who wait for it. Returns how many have somebody waiting.
CREATE FUNCTION note_ends(p_tenants uuid[], p_invocations uuid[], p_flags smallint[]) RETURNS int
LANGUAGE plpgsql SET search_path = sandbar, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
  n int := 0;
  any_flags smallint;
BEGIN
  SELECT bit_or(COALESCE(f, 24::smallint)) INTO any_flags FROM unnest(p_flags) f;
  IF any_flags & 16 <> 0 THEN
    DELETE FROM expiring e USING unnest(p_tenants, p_invocations) u(t, id) WHERE e.tenant_id = u.t AND e.invocation_id = u.id;
  END IF;
  IF any_flags & 8 <> 0 THEN
    PERFORM 1 FROM unique_keys k JOIN unnest(p_tenants, p_invocations) u(t, id) ON k.tenant_id = u.t AND k.invocation_id = u.id
      ORDER BY k.tenant_id, k.task_id, k.key FOR UPDATE OF k;
    DELETE FROM unique_keys k USING unnest(p_tenants, p_invocations) u(t, id) WHERE k.tenant_id = u.t AND k.invocation_id = u.id;
  END IF;
  DELETE FROM cancels c USING unnest(p_tenants, p_invocations) u(t, id) WHERE c.tenant_id = u.t AND c.invocation_id = u.id;
  INSERT INTO ended (tenant_id, invocation_id)
    SELECT u.t, u.id FROM unnest(p_tenants, p_invocations) u(t, id)
    WHERE EXISTS (SELECT 1 FROM dependencies d WHERE d.tenant_id = u.t AND d.on_id = u.id)
    ORDER BY 1, 2
    -- Not DO NOTHING: the duty may be about to drop a row that it found too early, and must be waited for.
    ON CONFLICT (tenant_id, invocation_id) DO UPDATE SET fence = NULL;
  GET DIAGNOSTICS n = ROW_COUNT;
  RETURN n;
END $$;

-- Lower what these items were charged to (flags as in leases), and bring back as many parked rows of each gate as it
-- got free. Returns how many came back. The caller holds the leases' locks.
CREATE FUNCTION release_slots(p_tenants uuid[], p_invocations uuid[], p_flags smallint[]) RETURNS int
LANGUAGE plpgsql SET search_path = sandbar, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
  g record;
  n int;
  back int := 0;
BEGIN
  FOR g IN
    SELECT c.tenant_id, c.scope, c.task_id, c.key, c.n FROM (
      SELECT u.t AS tenant_id, 0::smallint AS scope, '00000000-0000-0000-0000-000000000000'::uuid AS task_id, '' AS key, count(*)::int AS n
        FROM unnest(p_tenants, p_flags) u(t, f) WHERE u.f & 1 <> 0 GROUP BY 1
      UNION ALL
      SELECT u.t, s.scope, i.task_id, CASE s.scope WHEN 2 THEN i.concurrency_key ELSE '' END, count(*)::int
        FROM unnest(p_tenants, p_invocations, p_flags) u(t, id, f)
        JOIN invocations i ON i.tenant_id = u.t AND i.invocation_id = u.id
        CROSS JOIN (VALUES (1::smallint, 2), (2::smallint, 4)) s(scope, bit)
        WHERE u.f & 6 <> 0 AND u.f & s.bit <> 0 GROUP BY 1, 2, 3, 4
    ) c ORDER BY c.scope, c.tenant_id, c.task_id, c.key
  LOOP
    UPDATE caps c SET running = c.running - g.n
      WHERE c.tenant_id = g.tenant_id AND c.scope = g.scope AND c.task_id = g.task_id AND c.key = g.key;
    IF g.scope > 0 THEN
      WITH out AS (
        SELECT p.tenant_id, p.invocation_id FROM parked p
        WHERE p.tenant_id = g.tenant_id AND p.scope = g.scope AND p.task_id = g.task_id AND p.key = g.key
        ORDER BY p.rank, p.invocation_id LIMIT g.n FOR UPDATE SKIP LOCKED
      ), gone AS (
        DELETE FROM parked p USING out o WHERE p.tenant_id = o.tenant_id AND p.invocation_id = o.invocation_id
        RETURNING p.tenant_id, p.rank, p.invocation_id, p.attempt, p.spent, p.flags
      )
      INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent, flags)
        SELECT tenant_id, rank, invocation_id, attempt, spent, flags FROM gone;
      GET DIAGNOSTICS n = ROW_COUNT;
      back := back + n;
    END IF;
  END LOOP;
  RETURN back;
END $$;

-- Tell those who wait for ends: of p_invocations, or (NULL) of whatever `ended` has. At most p_limit dependants; an
-- end with more stays in `ended`. Met conditions are struck out, and who waits for nothing more becomes ready (or
-- scheduled, when its time has not come). An unmet condition cancels or lets run, as the dependant said.
-- Returns how many began to be ready, how many were cancelled, and whether there is more to do at once.
CREATE FUNCTION settle(p_tenants uuid[], p_invocations uuid[], p_limit int) RETURNS TABLE (released int, cancelled int, more boolean)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
  e record;
  d_ids uuid[];
  d_met boolean[];
  d_cancels boolean[];
  gone uuid[];
  n int;
  budget int := p_limit;
BEGIN
  released := 0; cancelled := 0; more := false;
  FOR e IN
    SELECT x.tenant_id, x.invocation_id, x.fence FROM ended x
    WHERE p_invocations IS NULL OR (x.tenant_id, x.invocation_id) IN (SELECT * FROM unnest(p_tenants, p_invocations))
    ORDER BY x.tenant_id, x.invocation_id LIMIT 500 FOR UPDATE SKIP LOCKED
  LOOP
    IF budget <= 0 THEN more := true; EXIT; END IF;
    -- Of one end: its dependants, in order; their rows in `scheduled` are locked before anything is decided, so that
    -- two ends with a common dependant see each other's strike.
    IF NOT EXISTS (SELECT 1 FROM results r WHERE r.tenant_id = e.tenant_id AND r.invocation_id = e.invocation_id) THEN
      -- Not an end yet: an enqueue asked to look. Whoever ends it from now on sees its dependants, once every
      -- transaction that began before is over.
      IF e.fence IS NULL THEN
        UPDATE ended SET fence = pg_snapshot_xmax(pg_current_snapshot()) WHERE tenant_id = e.tenant_id AND invocation_id = e.invocation_id;
      ELSIF pg_snapshot_xmin(pg_current_snapshot()) >= e.fence
        AND NOT EXISTS (SELECT 1 FROM results r WHERE r.tenant_id = e.tenant_id AND r.invocation_id = e.invocation_id) THEN
        DELETE FROM ended WHERE tenant_id = e.tenant_id AND invocation_id = e.invocation_id;
      END IF;
      CONTINUE;
    END IF;
    SELECT array_agg(d.invocation_id ORDER BY d.invocation_id) INTO d_ids FROM (
      SELECT d.invocation_id FROM dependencies d WHERE d.tenant_id = e.tenant_id AND d.on_id = e.invocation_id
      ORDER BY d.invocation_id LIMIT budget) d;
    PERFORM 1 FROM scheduled s WHERE s.tenant_id = e.tenant_id AND s.invocation_id = ANY (d_ids) ORDER BY s.invocation_id FOR UPDATE;
    WITH struck AS (
      DELETE FROM dependencies d WHERE d.tenant_id = e.tenant_id AND d.on_id = e.invocation_id AND d.invocation_id = ANY (d_ids)
      RETURNING d.invocation_id, d.condition, d.cancels
    )
    SELECT array_agg(s.invocation_id ORDER BY s.invocation_id),
      array_agg(CASE s.condition WHEN 'finished' THEN true WHEN 'succeeded' THEN r.state = 'succeeded' ELSE r.state <> 'succeeded' END ORDER BY s.invocation_id),
      array_agg(s.cancels ORDER BY s.invocation_id)
    INTO d_ids, d_met, d_cancels
    FROM struck s CROSS JOIN results r WHERE r.tenant_id = e.tenant_id AND r.invocation_id = e.invocation_id;
    n := COALESCE(cardinality(d_ids), 0);
    IF n >= budget THEN more := true;
    ELSE DELETE FROM ended WHERE tenant_id = e.tenant_id AND invocation_id = e.invocation_id; END IF;
    budget := budget - n;
    CONTINUE WHEN n = 0;
    -- Unmet, and that ends it.
    WITH doomed AS (
      DELETE FROM scheduled s USING unnest(d_ids, d_met, d_cancels) u(id, met, cancels)
      WHERE NOT u.met AND u.cancels AND s.tenant_id = e.tenant_id AND s.invocation_id = u.id
      RETURNING s.invocation_id
    ), ended_now AS (
      INSERT INTO results (tenant_id, invocation_id, state, reason)
      SELECT e.tenant_id, x.invocation_id, 'cancelled', 'dependency-unmet' FROM doomed x RETURNING invocation_id
    )
    SELECT array_agg(x.invocation_id) INTO gone FROM ended_now x;
    IF gone IS NOT NULL THEN
      DELETE FROM dependencies d WHERE d.tenant_id = e.tenant_id AND d.invocation_id = ANY (gone);
      cancelled := cancelled + cardinality(gone);
      IF note_ends(array_fill(e.tenant_id, ARRAY[cardinality(gone)]), gone, array_fill(24::smallint, ARRAY[cardinality(gone)])) > 0 THEN
        more := true;
      END IF;
    END IF;
    -- Nothing left to wait for.
    WITH freed AS (
      SELECT s.invocation_id, i.run_at FROM unnest(d_ids) u(id)
      JOIN scheduled s ON s.tenant_id = e.tenant_id AND s.invocation_id = u.id AND s.due_at IS NULL
      JOIN invocations i ON i.tenant_id = e.tenant_id AND i.invocation_id = u.id
      WHERE NOT EXISTS (SELECT 1 FROM dependencies d WHERE d.tenant_id = e.tenant_id AND d.invocation_id = u.id)
    ), later AS (
      UPDATE scheduled s SET due_at = f.run_at FROM freed f
      WHERE f.run_at > clock_timestamp() AND s.tenant_id = e.tenant_id AND s.invocation_id = f.invocation_id
    ), now AS (
      DELETE FROM scheduled s USING freed f
      WHERE (f.run_at > clock_timestamp()) IS NOT TRUE AND s.tenant_id = e.tenant_id AND s.invocation_id = f.invocation_id
      RETURNING s.invocation_id, s.rank, s.attempt, s.spent, s.flags
    )
    INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent, flags)
      SELECT e.tenant_id, x.rank, x.invocation_id, x.attempt, x.spent, x.flags FROM now x;
    GET DIAGNOSTICS n = ROW_COUNT;
    released := released + n;
  END LOOP;
  RETURN NEXT;
END $$;

-- ---------------------------------------------------------------- enqueue

-- Queue many invocations of many tenants in one statement. The only place where the tenant comes from the row and not
-- from the session, hence SECURITY DEFINER; callers have authenticated each row's tenant.
-- p_extras, NULL for a plain row: {"unique": {"key", "policy": reject | return | replace | debounce},
-- "concurrency": {"key", "limit"}, "depends_on": [{"id", "condition"}], "cancels": bool}.
-- Outcome per row: 'accepted'; 'waiting' (accepted, and waits for dependencies); 'replayed' (same idempotency key, same
-- body: the first invocation's id); 'conflict' (same key, other body); 'existing' (the holder of the unique key);
-- 'duplicate' (refused, the holder); 'unknown-dependency' (refused, the id that is unknown).
CREATE FUNCTION enqueue(
  p_tenants uuid[], p_ids uuid[], p_tasks uuid[], p_versions int[], p_priorities smallint[],
  p_inputs bytea[], p_specs jsonb[], p_tags jsonb[], p_run_at timestamptz[], p_expires_at timestamptz[],
  p_keys text[], p_fingerprints bytea[], p_key_ttl interval, p_extras jsonb[]
) RETURNS TABLE (ord int, outcome text, invocation_id uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  n int := cardinality(p_ids);
  keyed boolean := p_keys <> array_fill(NULL::text, ARRAY[cardinality(p_ids)]);
  extra boolean := p_extras <> array_fill(NULL::jsonb, ARRAY[cardinality(p_ids)]);
  ok boolean[];
  waits boolean[];
  outcomes text[];
  others uuid[];
  x record;
  holder uuid;
  h record;
  unknown uuid;
BEGIN
  IF array_position(p_tenants, NULL) IS NOT NULL THEN
    RAISE EXCEPTION 'a row without a tenant' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  ok := array_fill(true, ARRAY[n]);
  waits := array_fill(false, ARRAY[n]);
  IF keyed THEN
    DELETE FROM idempotency_keys k
      USING unnest(p_tenants, p_keys) AS u(tenant_id, key)
      WHERE k.tenant_id = u.tenant_id AND k.key = u.key AND k.expires_at <= now();
    -- Sorted, so that two flushes with the same keys wait for each other and never in a circle.
    INSERT INTO idempotency_keys (tenant_id, key, fingerprint, invocation_id, expires_at)
      SELECT u.tenant_id, u.key, u.fingerprint, u.id, now() + p_key_ttl
      FROM unnest(p_tenants, p_keys, p_fingerprints, p_ids) AS u(tenant_id, key, fingerprint, id)
      WHERE u.key IS NOT NULL ORDER BY u.tenant_id, u.key
      ON CONFLICT DO NOTHING;
    SELECT array_agg(u.key IS NULL OR k.invocation_id = u.id ORDER BY u.o),
      array_agg(CASE WHEN u.key IS NULL OR k.invocation_id = u.id THEN 'accepted'
                     WHEN k.fingerprint = u.fingerprint THEN 'replayed' ELSE 'conflict' END ORDER BY u.o),
      array_agg(k.invocation_id ORDER BY u.o)
    INTO ok, outcomes, others
    FROM unnest(p_tenants, p_keys, p_fingerprints, p_ids) WITH ORDINALITY AS u(tenant_id, key, fingerprint, id, o)
    LEFT JOIN idempotency_keys k ON k.tenant_id = u.tenant_id AND k.key = u.key;
  END IF;

  IF extra THEN
    IF outcomes IS NULL THEN
      outcomes := array_fill('accepted'::text, ARRAY[n]);
      others := p_ids;
    END IF;
    -- One by one: such rows are few, and each may depend on what became of the one before. In the order of keys, as
    -- everybody who locks several.
    FOR x IN
      SELECT u.o::int AS o, u.tenant_id, u.task_id, u.id, u.run_at, u.extra #>> '{unique,key}' AS ukey,
        u.extra #>> '{unique,policy}' AS policy, u.extra -> 'depends_on' AS deps
      FROM unnest(p_tenants, p_tasks, p_ids, p_run_at, p_extras) WITH ORDINALITY AS u(tenant_id, task_id, id, run_at, extra, o)
      WHERE u.extra IS NOT NULL
      ORDER BY u.tenant_id, u.task_id, u.extra #>> '{unique,key}', u.o
    LOOP
      CONTINUE WHEN NOT ok[x.o];
      IF x.deps IS NOT NULL THEN
        SELECT d.id INTO unknown FROM (SELECT (e ->> 'id')::uuid AS id FROM jsonb_array_elements(x.deps) e) d
          WHERE NOT EXISTS (SELECT 1 FROM invocations i WHERE i.tenant_id = x.tenant_id AND i.invocation_id = d.id) LIMIT 1;
        IF FOUND THEN
          ok[x.o] := false; outcomes[x.o] := 'unknown-dependency'; others[x.o] := unknown;
          CONTINUE;
        END IF;
        -- What has ended as wanted is not waited for. Anything else is, and settle decides.
        waits[x.o] := EXISTS (
          SELECT 1 FROM jsonb_array_elements(x.deps) e
          LEFT JOIN results r ON r.tenant_id = x.tenant_id AND r.invocation_id = (e ->> 'id')::uuid
          WHERE (CASE e ->> 'condition' WHEN 'finished' THEN r.state IS NOT NULL WHEN 'succeeded' THEN r.state = 'succeeded'
                 ELSE r.state <> 'succeeded' END) IS NOT TRUE);
      END IF;
      CONTINUE WHEN x.ukey IS NULL;
      LOOP
        INSERT INTO unique_keys (tenant_id, task_id, key, invocation_id) VALUES (x.tenant_id, x.task_id, x.ukey, x.id) ON CONFLICT DO NOTHING;
        EXIT WHEN FOUND;
        SELECT k.invocation_id INTO holder FROM unique_keys k
          WHERE k.tenant_id = x.tenant_id AND k.task_id = x.task_id AND k.key = x.ukey FOR UPDATE;
        CONTINUE WHEN NOT FOUND; -- it ended this moment
        SELECT rank_of(i.created_at, i.run_at, i.priority) AS rank, i.created_at, i.priority,
            EXISTS (SELECT 1 FROM results r WHERE r.tenant_id = x.tenant_id AND r.invocation_id = holder) AS over
          INTO h FROM invocations i WHERE i.tenant_id = x.tenant_id AND i.invocation_id = holder;
        IF holder = ANY (p_ids) AND h IS NULL THEN
          -- Accepted in this very flush: it waits, and is not stored yet. The second of two at once meets it below.
          IF x.policy = 'reject' THEN
            ok[x.o] := false; outcomes[x.o] := 'duplicate'; others[x.o] := holder;
          ELSIF x.policy = 'return' OR x.policy = 'replace' THEN
            -- Of two at once the first stands for both.
            ok[x.o] := false; outcomes[x.o] := 'existing'; others[x.o] := holder;
          ELSE
            p_run_at[array_position(p_ids, holder)] := GREATEST(p_run_at[array_position(p_ids, holder)], x.run_at);
            ok[x.o] := false; outcomes[x.o] := 'existing'; others[x.o] := holder;
          END IF;
        ELSIF h IS NULL OR h.over THEN
          UPDATE unique_keys k SET invocation_id = x.id WHERE k.tenant_id = x.tenant_id AND k.task_id = x.task_id AND k.key = x.ukey;
        ELSIF x.policy = 'return' THEN
          ok[x.o] := false; outcomes[x.o] := 'existing'; others[x.o] := holder;
        ELSIF x.policy = 'replace' AND unqueue(x.tenant_id, holder, h.rank, false) THEN
          INSERT INTO results (tenant_id, invocation_id, state, reason) VALUES (x.tenant_id, holder, 'cancelled', 'replaced');
          DELETE FROM dependencies d WHERE d.tenant_id = x.tenant_id AND d.invocation_id = holder;
          PERFORM note_ends(ARRAY[x.tenant_id], ARRAY[holder], ARRAY[16::smallint]);
          UPDATE unique_keys k SET invocation_id = x.id WHERE k.tenant_id = x.tenant_id AND k.task_id = x.task_id AND k.key = x.ukey;
        ELSIF x.policy = 'debounce' THEN
          IF debounce(x.tenant_id, holder, h.created_at, h.rank, h.priority, x.run_at) THEN
            ok[x.o] := false; outcomes[x.o] := 'existing'; others[x.o] := holder;
          ELSE -- it runs, so it does not stand for what happens now: the new one waits in its stead
            UPDATE unique_keys k SET invocation_id = x.id WHERE k.tenant_id = x.tenant_id AND k.task_id = x.task_id AND k.key = x.ukey;
          END IF;
        ELSE
          ok[x.o] := false; outcomes[x.o] := 'duplicate'; others[x.o] := holder;
        END IF;
        EXIT;
      END LOOP;
    END LOOP;
    IF keyed AND NOT ok = array_fill(true, ARRAY[n]) THEN
      -- A request that was refused may be repeated; one that was answered with another invocation is, with the same.
      DELETE FROM idempotency_keys k USING unnest(p_tenants, p_keys, p_ids, outcomes) AS u(tenant_id, key, id, outcome)
        WHERE u.outcome IN ('duplicate', 'unknown-dependency') AND k.tenant_id = u.tenant_id AND k.key = u.key AND k.invocation_id = u.id;
      UPDATE idempotency_keys k SET invocation_id = u.other FROM unnest(p_tenants, p_keys, p_ids, outcomes, others) AS u(tenant_id, key, id, outcome, other)
        WHERE u.outcome = 'existing' AND k.tenant_id = u.tenant_id AND k.key = u.key AND k.invocation_id = u.id;
      -- A repetition within this flush fares as its first.
      FOR x IN
        SELECT r.o::int AS o, f.outcome, f.other FROM unnest(outcomes, others) WITH ORDINALITY r(outcome, other, o)
        JOIN unnest(p_ids, outcomes, others) AS f(id, outcome, other) ON f.id = r.other
        WHERE r.outcome = 'replayed' AND f.outcome IN ('duplicate', 'existing', 'unknown-dependency')
      LOOP
        outcomes[x.o] := x.outcome; others[x.o] := x.other;
      END LOOP;
    END IF;
    INSERT INTO dependencies (tenant_id, on_id, invocation_id, condition, cancels)
      SELECT u.tenant_id, (e ->> 'id')::uuid, u.id, e ->> 'condition', COALESCE((u.extra ->> 'cancels')::boolean, true)
      FROM unnest(p_tenants, p_ids, p_extras, ok, waits) AS u(tenant_id, id, extra, ok, waits)
      CROSS JOIN LATERAL jsonb_array_elements(u.extra -> 'depends_on') e
      WHERE u.ok AND u.waits
      ON CONFLICT DO NOTHING;
    INSERT INTO ended (tenant_id, invocation_id)
      SELECT DISTINCT u.tenant_id, (e ->> 'id')::uuid
      FROM unnest(p_tenants, p_extras, ok, waits) AS u(tenant_id, extra, ok, waits)
      CROSS JOIN LATERAL jsonb_array_elements(u.extra -> 'depends_on') e
      WHERE u.ok AND u.waits ORDER BY 1, 2
      ON CONFLICT (tenant_id, invocation_id) DO UPDATE SET fence = NULL;
  END IF;

  INSERT INTO invocations (tenant_id, invocation_id, task_id, version, priority, input, spec, tags, run_at, expires_at,
      concurrency_key, concurrency_limit)
    SELECT u.tenant_id, u.id, u.task_id, u.version, u.priority, u.input, u.spec, u.tags, u.run_at, u.expires_at,
      u.extra #>> '{concurrency,key}', (u.extra #>> '{concurrency,limit}')::int
    FROM unnest(p_tenants, p_ids, p_tasks, p_versions, p_priorities, p_inputs, p_specs, p_tags, p_run_at, p_expires_at, p_extras, ok)
      AS u(tenant_id, id, task_id, version, priority, input, spec, tags, run_at, expires_at, extra, ok)
    WHERE u.ok;
  INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent, flags)
    SELECT u.tenant_id, rank_of(now(), u.run_at, u.priority), u.id, 1, 0,
      CASE WHEN u.expires_at IS NULL THEN 0 ELSE 16 END + CASE WHEN u.extra IS NULL THEN 0 ELSE
        CASE WHEN u.extra ? 'unique' THEN 8 ELSE 0 END + CASE WHEN u.extra ? 'concurrency' THEN 32 ELSE 0 END END
    FROM unnest(p_tenants, p_ids, p_priorities, p_run_at, p_expires_at, p_extras, ok, waits)
      AS u(tenant_id, id, priority, run_at, expires_at, extra, ok, waits)
    WHERE u.ok AND NOT u.waits AND (u.run_at IS NULL OR u.run_at <= now());
  -- Most flushes have none of these; an empty INSERT still costs its start.
  IF extra OR cardinality(array_remove(p_run_at, NULL)) > 0 THEN
    INSERT INTO scheduled (tenant_id, invocation_id, due_at, rank, attempt, spent, flags)
      SELECT u.tenant_id, u.id, CASE WHEN NOT u.waits THEN u.run_at END, rank_of(now(), u.run_at, u.priority), 1, 0,
        CASE WHEN u.expires_at IS NULL THEN 0 ELSE 16 END + CASE WHEN u.extra ? 'unique' THEN 8 ELSE 0 END
          + CASE WHEN u.extra ? 'concurrency' THEN 32 ELSE 0 END
      FROM unnest(p_tenants, p_ids, p_priorities, p_run_at, p_expires_at, p_extras, ok, waits)
        AS u(tenant_id, id, priority, run_at, expires_at, extra, ok, waits)
      WHERE u.ok AND (u.waits OR u.run_at > now());
  END IF;
  IF cardinality(array_remove(p_expires_at, NULL)) > 0 THEN
    INSERT INTO expiring (tenant_id, invocation_id, expires_at)
      SELECT u.tenant_id, u.id, u.expires_at
      FROM unnest(p_tenants, p_ids, p_expires_at, ok) AS u(tenant_id, id, expires_at, ok)
      WHERE u.ok AND u.expires_at IS NOT NULL;
  END IF;
  IF cardinality(array_remove(p_tags, '{}')) > 0 THEN
    INSERT INTO invocation_tags (tenant_id, key, value, invocation_id)
      SELECT u.tenant_id, t.key, t.value, u.id
      FROM unnest(p_tenants, p_ids, p_tags, ok) AS u(tenant_id, id, tags, ok)
      CROSS JOIN LATERAL jsonb_each_text(u.tags) AS t(key, value)
      WHERE u.ok;
  END IF;

  IF outcomes IS NULL THEN
    RETURN QUERY SELECT u.o::int - 1, 'accepted', u.id FROM unnest(p_ids) WITH ORDINALITY AS u(id, o);
  ELSE
    RETURN QUERY
      SELECT u.o::int - 1, CASE WHEN u.ok AND u.waits THEN 'waiting' ELSE u.outcome END, CASE WHEN u.ok THEN u.id ELSE u.other END
      FROM unnest(p_ids, ok, waits, outcomes, others) WITH ORDINALITY AS u(id, ok, waits, outcome, other, o) ORDER BY u.o;
  END IF;
END $$;

-- Push a waiting invocation back to p_run_at. False: it does not wait any more, or somebody is moving it.
CREATE FUNCTION debounce(p_tenant uuid, p_invocation uuid, p_created_at timestamptz, p_rank timestamptz, p_priority int, p_run_at timestamptz)
RETURNS boolean LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE
  s record;
BEGIN
  -- First, as change_invocation and cancel_invocation do, but without waiting.
  PERFORM 1 FROM invocations WHERE tenant_id = p_tenant AND invocation_id = p_invocation FOR NO KEY UPDATE SKIP LOCKED;
  IF NOT FOUND THEN RETURN false; END IF;
  SELECT due_at, attempt, spent, flags INTO s FROM scheduled
    WHERE tenant_id = p_tenant AND invocation_id = p_invocation FOR UPDATE SKIP LOCKED;
  IF FOUND THEN
    UPDATE scheduled SET due_at = CASE WHEN due_at IS NULL THEN NULL ELSE p_run_at END, rank = rank_of(p_created_at, p_run_at, p_priority)
      WHERE tenant_id = p_tenant AND invocation_id = p_invocation;
  ELSE
    SELECT q.attempt, q.spent, q.flags INTO s FROM queued q
      WHERE q.tenant_id = p_tenant AND q.rank = p_rank AND q.invocation_id = p_invocation;
    IF NOT FOUND OR NOT unqueue(p_tenant, p_invocation, p_rank, false) THEN RETURN false; END IF;
    INSERT INTO scheduled (tenant_id, invocation_id, due_at, rank, attempt, spent, flags)
      VALUES (p_tenant, p_invocation, p_run_at, rank_of(p_created_at, p_run_at, p_priority), s.attempt, s.spent, s.flags);
  END IF;
  UPDATE invocations SET run_at = p_run_at WHERE tenant_id = p_tenant AND invocation_id = p_invocation;
  RETURN true;
END $$;

-- ---------------------------------------------------------------- claim

-- Take up to p_counts[i] ready invocations of p_tenants[i], in order of service, under one new lease.
-- Says nothing about emptiness: under READ COMMITTED with SKIP LOCKED "no rows" proves nothing, so the caller never
-- concludes from it that a tenant has no work. Commits before any guest starts.
-- p_after[i]: look only at rows of this rank or later ('-infinity': at all). A hint against walking over rows that are
-- gone but that an old snapshot keeps; what lies below it is somebody's business again and again, see the worker.
-- SQLSTATE 23503 on leases_worker_id_epoch_fkey means: this worker, in this epoch, has been declared dead.
-- What the worker needs to run is joined here, within the taking function and never around it: a caller's snapshot is
-- older than the one taken here, would not see an invocation committed in between, and would drop what has been taken.
CREATE FUNCTION claim(p_worker uuid, p_epoch bigint, p_lease uuid, p_tenants uuid[], p_counts int[], p_after timestamptz[])
RETURNS TABLE (slot int, tenant_id uuid, invocation_id uuid, attempt smallint, spent smallint, rank timestamptz,
  weight int, task_id uuid, task text, sha256 bytea, input bytea, spec jsonb, tags jsonb)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp
-- A plan made while the queue was empty must not meet a full one: always by the indexes.
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
  capped boolean;
  gated boolean;
  wanted int[] := p_counts;
  spare int := 0;                      -- rows looked at beyond those wanted, once blocked ones were met
  blocked int;
  t uuid[]; k timestamptz[]; i uuid[]; a smallint[]; s smallint[]; f smallint[]; c tid[];
  fit int[];
  all_t uuid[] := '{}'; all_k timestamptz[] := '{}'; all_i uuid[] := '{}';
  all_a smallint[] := '{}'; all_s smallint[] := '{}'; all_f smallint[] := '{}';
BEGIN
  PERFORM pg_advisory_xact_lock_shared(7260002);
  -- First in the order of locks; the foreign key would take it last.
  PERFORM 1 FROM workers w WHERE w.worker_id = p_worker AND w.epoch = p_epoch FOR KEY SHARE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'this worker has been declared dead' USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'leases_worker_id_epoch_fkey';
  END IF;

  SELECT COALESCE(bool_or(x.cap IS NOT NULL), false), COALESCE(bool_or(x.gated), false) INTO capped, gated
    FROM unnest(p_tenants) u(t) JOIN caps x ON x.tenant_id = u.t AND x.scope = 0;
  IF capped THEN
    WITH locked AS MATERIALIZED (
      SELECT x.tenant_id, x.cap - x.running AS free FROM caps x
      WHERE x.tenant_id = ANY (p_tenants) AND x.scope = 0 AND x.cap IS NOT NULL ORDER BY x.tenant_id FOR UPDATE
    )
    SELECT array_agg(GREATEST(LEAST(u.n, l.free), 0) ORDER BY u.o) INTO wanted
      FROM unnest(p_tenants, p_counts) WITH ORDINALITY u(t, n, o) LEFT JOIN locked l ON l.tenant_id = u.t;
  END IF;

  FOR round IN 1..4 LOOP
    SELECT array_agg(r.tenant_id), array_agg(r.rank), array_agg(r.invocation_id), array_agg(r.attempt), array_agg(r.spent),
        array_agg(r.flags), array_agg(r.ctid), COALESCE(bit_or(r.flags), 0) & 32 <> 0 OR gated
      INTO t, k, i, a, s, f, c, gated
      FROM unnest(p_tenants, wanted, p_after) AS w(t, n, after)
      CROSS JOIN LATERAL (
        SELECT q.ctid, q.tenant_id, q.rank, q.invocation_id, q.attempt, q.spent, q.flags FROM ready q
        WHERE q.tenant_id = w.t AND q.rank >= w.after
        ORDER BY q.rank, q.invocation_id LIMIT CASE WHEN w.n > 0 THEN w.n + spare ELSE 0 END
        FOR UPDATE SKIP LOCKED
      ) r;
    EXIT WHEN t IS NULL;
    blocked := 0;
    IF gated THEN
      SELECT g.fit, g.flags, g.blocked INTO fit, f, blocked FROM pass_gates(t, k, i, a, s, f, c, p_tenants, wanted, round = 1) g;
      -- Only those that fit; the others are parked, or were looked at without being wanted.
      SELECT array_agg(t[o]), array_agg(k[o]), array_agg(i[o]), array_agg(a[o]), array_agg(s[o]), array_agg(f[o]), array_agg(c[o])
        INTO t, k, i, a, s, f, c FROM unnest(fit) o;
    END IF;
    IF t IS NOT NULL THEN
      DELETE FROM ready q WHERE q.ctid = ANY (c);
      IF round = 1 AND blocked = 0 THEN
        all_t := t; all_k := k; all_i := i; all_a := a; all_s := s; all_f := f;
      ELSE
        all_t := all_t || t; all_k := all_k || k; all_i := all_i || i; all_a := all_a || a; all_s := all_s || s; all_f := all_f || f;
        SELECT array_agg(w.n - (SELECT count(*)::int FROM unnest(t) x WHERE x = w.tenant) ORDER BY w.o) INTO wanted
          FROM unnest(p_tenants, wanted) WITH ORDINALITY w(tenant, n, o);
      END IF;
    END IF;
    -- Behind blocked rows there may be others: go on, with a longer look, a few times.
    EXIT WHEN blocked = 0;
    spare := 250;
  END LOOP;
  IF cardinality(all_t) = 0 THEN RETURN; END IF;

  IF capped THEN
    UPDATE caps x SET running = x.running + n.n
      FROM (SELECT u.t, count(*)::int AS n FROM unnest(all_t) u(t) GROUP BY u.t) n
      WHERE x.tenant_id = n.t AND x.scope = 0 AND x.cap IS NOT NULL;
    SELECT array_agg(u.f | CASE WHEN x.cap IS NULL THEN 0 ELSE 1 END::smallint ORDER BY u.o) INTO all_f
      FROM unnest(all_t, all_f) WITH ORDINALITY u(t, f, o) LEFT JOIN caps x ON x.tenant_id = u.t AND x.scope = 0;
  END IF;
  INSERT INTO leases (lease_id, worker_id, epoch, open, tenants, invocations, attempts, spent, flags)
    VALUES (p_lease, p_worker, p_epoch, cardinality(all_t), all_t, all_i, all_a, all_s,
      CASE WHEN all_f = array_fill(0::smallint, ARRAY[cardinality(all_f)]) THEN '{}' ELSE all_f END);
  RETURN QUERY
    SELECT u.o::int, u.t, u.i, u.a, u.s, u.k, o.weight, v.task_id, n.name, r.sha256, v.input, v.spec, v.tags
    FROM unnest(all_t, all_i, all_a, all_s, all_k) WITH ORDINALITY u(t, i, a, s, k, o)
    JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i
    JOIN tasks n ON n.tenant_id = v.tenant_id AND n.task_id = v.task_id
    JOIN versions r ON r.tenant_id = v.tenant_id AND r.task_id = v.task_id AND r.number = v.version
    JOIN tenants o ON o.tenant_id = u.t;
END $$;

-- Of picked and locked rows of `ready`: which fit through the gates of their tasks and concurrency keys (indexes, at
-- most p_wanted[i] of p_tenants[i]), with their flags; park those that do not. Raises what the fitting ones are
-- charged to. A row passes its key's gate before its task's, so places within a key go in order. Without p_wait (locks
-- are held already, so waiting for more could be waiting in a circle) a row whose gate somebody else has is left alone.
CREATE FUNCTION pass_gates(p_t uuid[], p_k timestamptz[], p_i uuid[], p_a smallint[], p_s smallint[], p_f smallint[], p_c tid[],
  p_tenants uuid[], p_wanted int[], p_wait boolean, OUT fit int[], OUT flags smallint[], OUT blocked int)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  g_task uuid[]; g_key text[]; g_lim int[];
  gate smallint[];
  ours boolean[];
BEGIN
  SELECT array_agg(v.task_id ORDER BY u.o), array_agg(v.concurrency_key ORDER BY u.o), array_agg(v.concurrency_limit ORDER BY u.o)
    INTO g_task, g_key, g_lim
    FROM unnest(p_t, p_i) WITH ORDINALITY u(t, i, o)
    JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i;
  IF p_wait THEN
    PERFORM 1 FROM caps x WHERE x.scope = 1 AND (x.tenant_id, x.task_id) IN (SELECT * FROM unnest(p_t, g_task))
      ORDER BY x.tenant_id, x.task_id FOR UPDATE;
    -- The row of a key is made by the first claim that meets it; the update locks one that is there.
    INSERT INTO caps (tenant_id, scope, task_id, key)
      SELECT DISTINCT u.t, 2::smallint, u.task, u.key FROM unnest(p_t, g_task, g_key) u(t, task, key) WHERE u.key IS NOT NULL
      ORDER BY 1, 3, 4
      ON CONFLICT (tenant_id, scope, task_id, key) DO UPDATE SET running = caps.running;
    ours := array_fill(true, ARRAY[cardinality(p_t)]);
  ELSE
    WITH tasks_of AS MATERIALIZED (
      SELECT x.tenant_id, x.task_id FROM caps x WHERE x.scope = 1 AND (x.tenant_id, x.task_id) IN (SELECT * FROM unnest(p_t, g_task))
      FOR UPDATE SKIP LOCKED
    ), keys_of AS MATERIALIZED (
      SELECT x.tenant_id, x.task_id, x.key FROM caps x
      WHERE x.scope = 2 AND (x.tenant_id, x.task_id, x.key) IN (SELECT * FROM unnest(p_t, g_task, g_key)) FOR UPDATE SKIP LOCKED
    )
    SELECT array_agg((g.task_id IS NOT NULL OR NOT EXISTS (SELECT 1 FROM caps x WHERE x.tenant_id = u.t AND x.scope = 1 AND x.task_id = u.task))
        AND (u.key IS NULL OR h.key IS NOT NULL) ORDER BY u.o) INTO ours
      FROM unnest(p_t, g_task, g_key) WITH ORDINALITY u(t, task, key, o)
      LEFT JOIN tasks_of g ON g.tenant_id = u.t AND g.task_id = u.task
      LEFT JOIN keys_of h ON h.tenant_id = u.t AND h.task_id = u.task AND h.key = u.key;
  END IF;

  WITH item AS (
    SELECT u.*, row_number() OVER (PARTITION BY u.t, u.task, u.key ORDER BY u.k, u.i) AS key_place
    FROM unnest(p_t, p_k, p_i, p_f, g_task, g_key, g_lim, ours) WITH ORDINALITY u(t, k, i, f, task, key, lim, ours, o)
  ), keyed AS (
    SELECT m.*, (m.key IS NULL OR x.running + m.key_place <= m.lim) AS key_open
    FROM item m LEFT JOIN caps x ON m.key IS NOT NULL AND x.tenant_id = m.t AND x.scope = 2 AND x.task_id = m.task AND x.key = m.key
  ), tasked AS (
    SELECT m.*, x.task_id IS NOT NULL AS counted, x.cap - x.running AS free,
      row_number() OVER (PARTITION BY m.t, m.task, m.ours AND m.key_open ORDER BY m.k, m.i) AS task_place
    FROM keyed m LEFT JOIN caps x ON x.tenant_id = m.t AND x.scope = 1 AND x.task_id = m.task
  ), judged AS (
    SELECT m.*, CASE WHEN NOT m.ours THEN 0::smallint WHEN NOT m.key_open THEN 2::smallint WHEN m.task_place > m.free THEN 1::smallint END AS gate
    FROM tasked m
  ), placed AS (
    SELECT m.*, row_number() OVER (PARTITION BY m.t, m.gate IS NULL ORDER BY m.k, m.i) AS place FROM judged m
  )
  SELECT array_agg(p.o::int ORDER BY p.o) FILTER (WHERE p.gate IS NULL AND p.place <= w.n),
    array_agg((p.f | CASE WHEN p.counted THEN 2 ELSE 0 END | CASE WHEN p.key IS NULL THEN 0 ELSE 4 END)::smallint ORDER BY p.o),
    array_agg(p.gate ORDER BY p.o),
    count(*) FILTER (WHERE p.gate > 0)
    INTO fit, flags, gate, blocked
    FROM placed p JOIN unnest(p_tenants, p_wanted) w(t, n) ON w.t = p.t;

  IF blocked > 0 THEN
    INSERT INTO parked (tenant_id, invocation_id, scope, task_id, key, rank, attempt, spent, flags)
      SELECT u.t, u.i, u.gate, u.task, CASE u.gate WHEN 2 THEN u.key ELSE '' END, u.k, u.a, u.s, u.f
      FROM unnest(p_t, p_i, p_k, p_a, p_s, p_f, g_task, g_key, gate) u(t, i, k, a, s, f, task, key, gate) WHERE u.gate > 0;
    DELETE FROM ready q WHERE q.ctid = ANY (ARRAY(SELECT u.c FROM unnest(p_c, gate) u(c, gate) WHERE u.gate > 0));
  END IF;
  UPDATE caps x SET running = x.running + n.n
    FROM (SELECT p_t[o] AS t, g_task[o] AS task, count(*)::int AS n FROM unnest(fit) o WHERE flags[o] & 2 <> 0 GROUP BY 1, 2) n
    WHERE x.tenant_id = n.t AND x.scope = 1 AND x.task_id = n.task;
  UPDATE caps x SET running = x.running + n.n
    FROM (SELECT p_t[o] AS t, g_task[o] AS task, g_key[o] AS key, count(*)::int AS n FROM unnest(fit) o WHERE flags[o] & 4 <> 0 GROUP BY 1, 2, 3) n
    WHERE x.tenant_id = n.t AND x.scope = 2 AND x.task_id = n.task AND x.key = n.key;
END $$;

-- ---------------------------------------------------------------- ack

-- Finish attempts: result, receipt, log, usage, and what comes next, in one transaction and only for items whose lease
-- still stands. Locks the leases first, in order; the reaper takes the same locks, so whoever comes second finds the
-- lease gone or the attempt's row there and changes nothing. Returns what was accepted, with the state the invocation
-- now has; what is not returned came too late, or a second time. `wake`: other work has become claimable by this.
--
-- p_verdicts: 'succeeded' | 'dead' | 'cancelled' | 'retry' (again after p_delay_ms, counts against the policy) |
-- 'release' (again after p_delay_ms, does not count: the host's fault, not the guest's).
CREATE FUNCTION ack(
  p_worker uuid, p_epoch bigint,
  p_leases uuid[], p_slots int[], p_tenants uuid[], p_invocations uuid[], p_attempts smallint[], p_spent smallint[], p_tasks uuid[],
  p_verdicts text[], p_delay_ms bigint[], p_started_at timestamptz[], p_terminations jsonb[],
  p_fuel bigint[], p_fuel_exact boolean[], p_cpu_ns bigint[], p_wall_ns bigint[], p_peak_memory_bytes bigint[],
  p_input_bytes bigint[], p_output_bytes bigint[], p_output_dropped_bytes bigint[],
  p_log_bytes bigint[], p_log_dropped_bytes bigint[], p_egress_bytes bigint[], p_host_calls bigint[],
  p_backtraces jsonb[], p_outputs bytea[], p_content_types text[], p_logs bytea[]
) RETURNS TABLE (tenant_id uuid, invocation_id uuid, state text, wake boolean)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
  held uuid[] := '{}';
  flagged boolean;
  n int := cardinality(p_leases);
  accepted int;
  late int;
  ok boolean[];
  finals text[] := p_verdicts;
  flags smallint[];
  again boolean := p_verdicts && ARRAY['retry', 'release'];
  woken boolean := false;
  e_t uuid[]; e_i uuid[]; e_f smallint[];
BEGIN
  -- The lock. Without it a reaper could hand the item on between our check and our commit.
  SELECT COALESCE(array_agg(l.lease_id), '{}'), COALESCE(bool_or(l.flagged), false) INTO held, flagged FROM (
    SELECT x.lease_id, cardinality(x.flags) > 0 AS flagged FROM leases x
    WHERE x.lease_id = ANY (p_leases) AND x.worker_id = p_worker AND x.epoch = p_epoch
    ORDER BY x.lease_id FOR UPDATE) l;

  -- Nobody else can end these attempts while we hold their leases, so asking first is as good as ON CONFLICT, and
  -- cheaper. The key of `attempts` stays the last fence.
  SELECT array_agg(u.lease_id = ANY (held) AND a.attempt IS NULL ORDER BY u.o),
      count(*) FILTER (WHERE u.lease_id = ANY (held) AND a.attempt IS NULL),
      -- An ack repeated because its answer was lost is not late: its attempt has a receipt, a lost one has none.
      count(*) FILTER (WHERE u.lease_id <> ALL (held) AND a.fuel IS NULL)
    INTO ok, accepted, late
    FROM unnest(p_leases, p_tenants, p_invocations, p_attempts) WITH ORDINALITY u(lease_id, t, i, a, o)
    LEFT JOIN attempts a ON a.tenant_id = u.t AND a.invocation_id = u.i AND a.attempt = u.a;
  IF late > 0 THEN INSERT INTO late_acks (worker_id, items) VALUES (p_worker, late); END IF;
  IF accepted = 0 THEN RETURN; END IF;
  -- Zeros that most attempts have are stored as NULL: nothing in the row, and nothing in the log of Postgres.
  INSERT INTO attempts (tenant_id, invocation_id, attempt, worker_id, lease_id, started_at, termination,
      fuel, fuel_exact, cpu_ns, wall_ns, peak_memory_bytes, input_bytes, output_bytes, output_dropped_bytes,
      log_bytes, log_dropped_bytes, egress_bytes, host_calls, backtrace)
    SELECT u.tenant_id, u.invocation_id, u.attempt, p_worker, u.lease_id, u.started_at, u.termination,
      u.fuel, u.fuel_exact, u.cpu_ns, u.wall_ns, u.peak_memory_bytes, u.input_bytes, u.output_bytes, NULLIF(u.output_dropped_bytes, 0),
      NULLIF(u.log_bytes, 0), NULLIF(u.log_dropped_bytes, 0), NULLIF(u.egress_bytes, 0), NULLIF(u.host_calls, 0), u.backtrace
    FROM unnest(ok, p_leases, p_tenants, p_invocations, p_attempts, p_started_at, p_terminations, p_fuel, p_fuel_exact, p_cpu_ns, p_wall_ns,
        p_peak_memory_bytes, p_input_bytes, p_output_bytes, p_output_dropped_bytes, p_log_bytes, p_log_dropped_bytes, p_egress_bytes,
        p_host_calls, p_backtraces)
      AS u(ok, lease_id, tenant_id, invocation_id, attempt, started_at, termination, fuel, fuel_exact, cpu_ns, wall_ns,
        peak_memory_bytes, input_bytes, output_bytes, output_dropped_bytes, log_bytes, log_dropped_bytes, egress_bytes,
        host_calls, backtrace)
    WHERE u.ok;

  IF flagged THEN
    SELECT array_agg(COALESCE(l.flags[u.slot], 0::smallint) ORDER BY u.o) INTO flags
      FROM unnest(p_leases, p_slots) WITH ORDINALITY u(lease_id, slot, o) LEFT JOIN leases l ON l.lease_id = u.lease_id;
  ELSE
    flags := array_fill(0::smallint, ARRAY[n]);
  END IF;

  IF again THEN
    -- A cancellation that came while it ran wins over another attempt, not over a result.
    SELECT array_agg(CASE WHEN u.v IN ('retry', 'release')
             AND EXISTS (SELECT 1 FROM cancels c WHERE c.tenant_id = u.t AND c.invocation_id = u.i) THEN 'cancelled' ELSE u.v END ORDER BY u.o)
      INTO finals FROM unnest(p_verdicts, p_tenants, p_invocations) WITH ORDINALITY u(v, t, i, o);
    INSERT INTO scheduled (tenant_id, invocation_id, due_at, rank, attempt, spent, flags)
      SELECT u.t, u.i, clock_timestamp() + u.delay * interval '1 millisecond', rank_of(v.created_at, v.run_at, v.priority),
        u.a + 1, u.s + CASE u.v WHEN 'retry' THEN 1 ELSE 0 END, u.f & 56
      FROM unnest(ok, finals, p_delay_ms, p_tenants, p_invocations, p_attempts, p_spent, flags) u(ok, v, delay, t, i, a, s, f)
      JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i
      WHERE u.ok AND (u.v = 'retry' OR u.v = 'release' AND u.delay > 0);
    INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent, flags)
      SELECT u.t, rank_of(v.created_at, v.run_at, v.priority), u.i, u.a + 1, u.s, u.f & 56
      FROM unnest(ok, finals, p_delay_ms, p_tenants, p_invocations, p_attempts, p_spent, flags) u(ok, v, delay, t, i, a, s, f)
      JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i
      WHERE u.ok AND u.v = 'release' AND u.delay <= 0;
    woken := FOUND;
  END IF;

  INSERT INTO results (tenant_id, invocation_id, state, reason, output, content_type)
    SELECT u.t, u.i, u.v, CASE u.v WHEN 'cancelled' THEN 'cancelled' ELSE COALESCE(u.termination ->> 'reason', 'unknown') END, u.output, u.content_type
    FROM unnest(ok, finals, p_tenants, p_invocations, p_terminations, p_outputs, p_content_types) u(ok, v, t, i, termination, output, content_type)
    WHERE u.ok AND u.v IN ('succeeded', 'dead', 'cancelled');
  IF cardinality(array_remove(p_logs, NULL)) > 0 THEN
    INSERT INTO logs (tenant_id, invocation_id, attempt, chunk, records)
      SELECT u.t, u.i, u.a, 0, u.log FROM unnest(ok, p_tenants, p_invocations, p_attempts, p_logs) u(ok, t, i, a, log)
      WHERE u.ok AND u.log IS NOT NULL;
  END IF;
  INSERT INTO usage_deltas (tenant_id, task_id, hour, attempts, succeeded, fuel, cpu_ns, wall_ns, input_bytes, output_bytes, log_bytes, egress_bytes)
    SELECT u.t, u.k, date_trunc('hour', clock_timestamp(), 'UTC'), count(*), count(*) FILTER (WHERE u.v = 'succeeded'),
      sum(u.fuel), sum(u.cpu), sum(u.wall), sum(u.inp), sum(u.outp), sum(u.log), sum(u.egress)
    FROM unnest(ok, p_tenants, p_tasks, finals, p_fuel, p_cpu_ns, p_wall_ns, p_input_bytes, p_output_bytes, p_log_bytes, p_egress_bytes)
      u(ok, t, k, v, fuel, cpu, wall, inp, outp, log, egress)
    WHERE u.ok GROUP BY u.t, u.k;

  -- Most leases end whole; the others get shorter.
  DELETE FROM leases l USING (
      SELECT u.lease_id, count(*)::int AS n FROM unnest(ok, p_leases) u(ok, lease_id) WHERE u.ok GROUP BY 1) d
    WHERE l.lease_id = d.lease_id AND l.open <= d.n;
  GET DIAGNOSTICS late = ROW_COUNT;
  IF late < cardinality(held) THEN
    UPDATE leases l SET open = l.open - d.n FROM (
        SELECT u.lease_id, count(*)::int AS n FROM unnest(ok, p_leases) u(ok, lease_id) WHERE u.ok GROUP BY 1) d
      WHERE l.lease_id = d.lease_id;
  END IF;

  IF flagged THEN
    SELECT array_agg(u.t), array_agg(u.i), array_agg(u.f) INTO e_t, e_i, e_f
      FROM unnest(ok, p_tenants, p_invocations, flags) u(ok, t, i, f) WHERE u.ok AND u.f & 7 <> 0;
    IF e_t IS NOT NULL THEN
      PERFORM release_slots(e_t, e_i, e_f);
      woken := true;
    END IF;
  END IF;
  IF again OR accepted < n THEN
    SELECT array_agg(u.t), array_agg(u.i), array_agg(u.f) INTO e_t, e_i, e_f
      FROM unnest(ok, finals, p_tenants, p_invocations, flags) u(ok, v, t, i, f) WHERE u.ok AND u.v IN ('succeeded', 'dead', 'cancelled');
  ELSE
    e_t := p_tenants; e_i := p_invocations; e_f := flags;
  END IF;
  IF e_t IS NOT NULL AND note_ends(e_t, e_i, e_f) > 0 THEN
    woken := (SELECT s.released > 0 FROM settle(e_t, e_i, 500) s) OR woken;
  END IF;

  RETURN QUERY
    SELECT u.t, u.i, CASE WHEN u.v = 'retry' OR (u.v = 'release' AND u.delay > 0) THEN 'scheduled' WHEN u.v = 'release' THEN 'queued' ELSE u.v END, woken
    FROM unnest(ok, finals, p_delay_ms, p_tenants, p_invocations) u(ok, v, delay, t, i) WHERE u.ok;
END $$;

-- ---------------------------------------------------------------- other moves

-- Cancel one invocation of this session's tenant. 'cancelled' (it was waiting), 'cancelling' (it runs: its worker
-- will be told), 'finished' (too late), 'unknown'.
CREATE FUNCTION cancel_invocation(p_invocation uuid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
  r timestamptz;
BEGIN
  -- Locked, so that its rank stays what it is.
  SELECT rank_of(created_at, run_at, priority) INTO r FROM invocations
    WHERE tenant_id = t AND invocation_id = p_invocation FOR NO KEY UPDATE;
  IF NOT FOUND THEN RETURN 'unknown'; END IF;
  -- Waits for a claim or promotion in progress; what they took on is found in the next place.
  IF unqueue(t, p_invocation, r, true) THEN
    INSERT INTO results (tenant_id, invocation_id, state, reason) VALUES (t, p_invocation, 'cancelled', 'cancelled');
    DELETE FROM dependencies WHERE tenant_id = t AND invocation_id = p_invocation;
    IF note_ends(ARRAY[t], ARRAY[p_invocation], ARRAY[24::smallint]) > 0 THEN
      PERFORM settle(ARRAY[t], ARRAY[p_invocation], 500);
    END IF;
    RETURN 'cancelled';
  END IF;
  IF EXISTS (SELECT 1 FROM results WHERE tenant_id = t AND invocation_id = p_invocation) THEN RETURN 'finished'; END IF;
  -- Running, or moving between places right now: whoever moves it next sees this row.
  INSERT INTO cancels (tenant_id, invocation_id) VALUES (t, p_invocation) ON CONFLICT DO NOTHING;
  RETURN 'cancelling';
END $$;

-- As 0002 made it, with the places and ranks of this file. One that waits for dependencies goes on waiting; its new time
-- counts when they have ended. Parked rows are waiting rows.
CREATE OR REPLACE FUNCTION change_invocation(p_invocation uuid, p_priority smallint, p_set_run_at boolean, p_run_at timestamptz,
  p_reset_tags boolean, p_tags jsonb, p_max_tags int) RETURNS text
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
  i record;
  w record;
  new_tags jsonb;
  old_rank timestamptz;
  new_rank timestamptz;
  parked_now boolean := false;
  later boolean := p_set_run_at AND COALESCE(p_run_at > clock_timestamp(), false);
  outcome text := 'changed';
BEGIN
  SELECT priority, tags, expires_at, created_at, run_at INTO i FROM invocations
    WHERE tenant_id = t AND invocation_id = p_invocation FOR NO KEY UPDATE;
  IF NOT FOUND THEN RETURN 'unknown'; END IF;
  new_tags := jsonb_strip_nulls(CASE WHEN p_reset_tags THEN '{}' ELSE i.tags END || COALESCE(p_tags, '{}'));
  IF (SELECT count(*) FROM jsonb_object_keys(new_tags)) > p_max_tags THEN RETURN 'tags'; END IF;
  IF later AND i.expires_at <= p_run_at THEN RETURN 'expiry'; END IF;

  IF p_priority IS NOT NULL OR p_set_run_at THEN
    old_rank := rank_of(i.created_at, i.run_at, i.priority);
    new_rank := rank_of(i.created_at, CASE WHEN p_set_run_at THEN p_run_at ELSE i.run_at END, COALESCE(p_priority, i.priority));
    SELECT attempt, spent, flags, due_at INTO w FROM scheduled WHERE tenant_id = t AND invocation_id = p_invocation FOR UPDATE;
    IF FOUND THEN
      -- One that somebody wants cancelled is left to the promotion, which ends it.
      IF p_set_run_at AND NOT later AND w.due_at IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM cancels WHERE tenant_id = t AND invocation_id = p_invocation) THEN
        DELETE FROM scheduled WHERE tenant_id = t AND invocation_id = p_invocation;
        INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent, flags)
          VALUES (t, new_rank, p_invocation, w.attempt, w.spent, w.flags);
        outcome := 'ready';
      ELSE
        UPDATE scheduled SET rank = new_rank,
            due_at = CASE WHEN NOT p_set_run_at OR due_at IS NULL THEN due_at WHEN later THEN p_run_at ELSE clock_timestamp() END
          WHERE tenant_id = t AND invocation_id = p_invocation;
      END IF;
    ELSE
      SELECT attempt, spent, flags INTO w FROM ready
        WHERE tenant_id = t AND rank = old_rank AND invocation_id = p_invocation FOR UPDATE;
      IF NOT FOUND THEN
        SELECT attempt, spent, flags INTO w FROM parked WHERE tenant_id = t AND invocation_id = p_invocation FOR UPDATE;
        parked_now := FOUND;
        IF NOT FOUND THEN
          -- `ready` again, as unqueue does: what a freed slot brought back meanwhile.
          SELECT attempt, spent, flags INTO w FROM ready
            WHERE tenant_id = t AND rank = old_rank AND invocation_id = p_invocation FOR UPDATE;
          IF NOT FOUND THEN
            RETURN CASE WHEN EXISTS (SELECT 1 FROM results WHERE tenant_id = t AND invocation_id = p_invocation)
              THEN 'finished' ELSE 'started' END;
          END IF;
        END IF;
      END IF;
      IF later THEN
        DELETE FROM ready WHERE tenant_id = t AND rank = old_rank AND invocation_id = p_invocation;
        DELETE FROM parked WHERE tenant_id = t AND invocation_id = p_invocation;
        INSERT INTO scheduled (tenant_id, invocation_id, due_at, rank, attempt, spent, flags)
          VALUES (t, p_invocation, p_run_at, new_rank, w.attempt, w.spent, w.flags);
      ELSIF parked_now THEN
        UPDATE parked SET rank = new_rank WHERE tenant_id = t AND invocation_id = p_invocation;
      ELSE
        UPDATE ready SET rank = new_rank WHERE tenant_id = t AND rank = old_rank AND invocation_id = p_invocation;
        outcome := 'ready';
      END IF;
    END IF;
  END IF;

  UPDATE invocations SET priority = COALESCE(p_priority, priority), tags = new_tags,
      run_at = CASE WHEN p_set_run_at THEN p_run_at ELSE run_at END
    WHERE tenant_id = t AND invocation_id = p_invocation;
  IF new_tags <> i.tags THEN
    DELETE FROM invocation_tags g USING jsonb_each_text(i.tags) o(key, value)
      WHERE g.tenant_id = t AND g.key = o.key AND g.value = o.value AND g.invocation_id = p_invocation;
    INSERT INTO invocation_tags (tenant_id, key, value, invocation_id)
      SELECT t, n.key, n.value, p_invocation FROM jsonb_each_text(new_tags) n(key, value);
  END IF;
  RETURN outcome;
END $$;

-- Move what is due from `scheduled` to `ready`, at most p_limit; cancelled ones end here.
CREATE FUNCTION promote(p_limit int) RETURNS bigint
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  n bigint;
  e_t uuid[]; e_i uuid[]; e_f smallint[];
BEGIN
  WITH due AS (
    SELECT tenant_id, invocation_id FROM scheduled WHERE due_at <= clock_timestamp()
    ORDER BY due_at LIMIT p_limit FOR UPDATE SKIP LOCKED
  ), moved AS (
    DELETE FROM scheduled s USING due d WHERE s.tenant_id = d.tenant_id AND s.invocation_id = d.invocation_id
    RETURNING s.tenant_id, s.invocation_id, s.rank, s.attempt, s.spent, s.flags
  ), stopped AS (
    SELECT m.tenant_id, m.invocation_id, m.flags FROM moved m
    WHERE EXISTS (SELECT 1 FROM cancels c WHERE c.tenant_id = m.tenant_id AND c.invocation_id = m.invocation_id)
  ), ended AS (
    INSERT INTO results (tenant_id, invocation_id, state, reason)
    SELECT tenant_id, invocation_id, 'cancelled', 'cancelled' FROM stopped
  ), started AS (
    INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent, flags)
    SELECT m.tenant_id, m.rank, m.invocation_id, m.attempt, m.spent, m.flags FROM moved m
    WHERE NOT EXISTS (SELECT 1 FROM stopped s WHERE s.tenant_id = m.tenant_id AND s.invocation_id = m.invocation_id)
  )
  SELECT (SELECT count(*) FROM moved), array_agg(s.tenant_id), array_agg(s.invocation_id), array_agg(s.flags)
    INTO n, e_t, e_i, e_f FROM stopped s;
  IF e_t IS NOT NULL THEN PERFORM note_ends(e_t, e_i, e_f); END IF;
  RETURN n;
END $$;

-- End waiting invocations whose expiry has passed, at most p_limit. Running ones are left to finish; their row in
-- `expiring` goes with them, so a retry after the expiry ends here too.
CREATE FUNCTION expire(p_limit int) RETURNS TABLE (tenant_id uuid, invocation_id uuid)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  e_t uuid[]; e_i uuid[];
BEGIN
  WITH due AS MATERIALIZED (
    SELECT e.tenant_id, e.invocation_id, rank_of(i.created_at, i.run_at, i.priority) AS rank
    FROM expiring e JOIN invocations i USING (tenant_id, invocation_id)
    WHERE e.expires_at <= clock_timestamp()
      AND (EXISTS (SELECT 1 FROM queued r WHERE r.tenant_id = e.tenant_id AND r.rank = rank_of(i.created_at, i.run_at, i.priority)
                   AND r.invocation_id = e.invocation_id)
        OR EXISTS (SELECT 1 FROM scheduled s WHERE s.tenant_id = e.tenant_id AND s.invocation_id = e.invocation_id))
    ORDER BY e.expires_at LIMIT p_limit
  ), a AS (
    DELETE FROM ready r USING due d WHERE r.tenant_id = d.tenant_id AND r.rank = d.rank AND r.invocation_id = d.invocation_id
    RETURNING r.tenant_id, r.invocation_id
  ), b AS (
    DELETE FROM scheduled s USING due d WHERE s.tenant_id = d.tenant_id AND s.invocation_id = d.invocation_id
    RETURNING s.tenant_id, s.invocation_id
  ), c AS (
    DELETE FROM parked p USING due d WHERE p.tenant_id = d.tenant_id AND p.invocation_id = d.invocation_id
    RETURNING p.tenant_id, p.invocation_id
  ), ended AS (
    INSERT INTO results (tenant_id, invocation_id, state, reason)
    SELECT g.tenant_id, g.invocation_id, 'expired', 'expired' FROM (SELECT * FROM a UNION ALL SELECT * FROM b UNION ALL SELECT * FROM c) g
    RETURNING tenant_id, invocation_id
  )
  SELECT array_agg(x.tenant_id), array_agg(x.invocation_id) INTO e_t, e_i FROM ended x;
  IF e_t IS NULL THEN RETURN; END IF;
  DELETE FROM dependencies d USING unnest(e_t, e_i) u(t, i) WHERE d.tenant_id = u.t AND d.invocation_id = u.i;
  PERFORM note_ends(e_t, e_i, array_fill(24::smallint, ARRAY[cardinality(e_t)]));
  RETURN QUERY SELECT u.t, u.i FROM unnest(e_t, e_i) u(t, i);
END $$;

-- Declare dead every worker silent for p_dead_after and hand its open work on: each open item gets a `lease-lost`
-- attempt without a receipt and goes back to ready under the next number, without using up a retry; an invocation
-- handed on p_max_handovers times is dead (it may be what kills its hosts). What the items were charged to is given
-- back. p_worker: only that one, at once (a worker that leaves or starts again under its own id).
-- Returns (workers, items handed on, of those given up).
CREATE FUNCTION reap(p_dead_after interval, p_max_handovers int, p_worker uuid DEFAULT NULL)
RETURNS TABLE (workers bigint, handed_on bigint, given_up bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  w record;
  n_items bigint;
  n_dead bigint;
  o_t uuid[]; o_i uuid[]; o_f smallint[];
  e_t uuid[]; e_i uuid[]; e_f smallint[];
BEGIN
  workers := 0; handed_on := 0; given_up := 0;
  FOR w IN
    SELECT k.worker_id, k.epoch FROM workers k
    WHERE CASE WHEN p_worker IS NULL THEN k.heartbeat_at < clock_timestamp() - p_dead_after ELSE k.worker_id = p_worker END
    FOR UPDATE SKIP LOCKED
  LOOP
    workers := workers + 1;
    -- The same lock as an ack's: an ack that came first has its attempts in place, one that comes later finds no lease.
    PERFORM 1 FROM leases l WHERE l.worker_id = w.worker_id AND l.epoch = w.epoch ORDER BY l.lease_id FOR UPDATE;
    WITH open AS MATERIALIZED (
      SELECT l.lease_id, l.claimed_at, u.tenant_id, u.invocation_id, u.attempt, u.spent, COALESCE(u.flags, 0::smallint) AS flags
      FROM leases l
      CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts, l.spent, l.flags) AS u(tenant_id, invocation_id, attempt, spent, flags)
      WHERE l.worker_id = w.worker_id AND l.epoch = w.epoch
        AND NOT EXISTS (SELECT 1 FROM attempts a
          WHERE a.tenant_id = u.tenant_id AND a.invocation_id = u.invocation_id AND a.attempt = u.attempt)
    ), lost AS (
      INSERT INTO attempts (tenant_id, invocation_id, attempt, worker_id, lease_id, started_at, termination)
      SELECT o.tenant_id, o.invocation_id, o.attempt, w.worker_id, o.lease_id, o.claimed_at, '{"reason": "lease-lost"}'
      FROM open o
    ), verdict AS MATERIALIZED (
      SELECT o.*, rank_of(i.created_at, i.run_at, i.priority) AS rank,
        CASE WHEN EXISTS (SELECT 1 FROM cancels c WHERE c.tenant_id = o.tenant_id AND c.invocation_id = o.invocation_id) THEN 'cancelled'
             WHEN o.attempt - o.spent > p_max_handovers THEN 'dead' END AS final
      FROM open o JOIN invocations i USING (tenant_id, invocation_id)
    ), ended AS (
      INSERT INTO results (tenant_id, invocation_id, state, reason)
      SELECT v.tenant_id, v.invocation_id, v.final, CASE v.final WHEN 'cancelled' THEN 'cancelled' ELSE 'lease-lost' END
      FROM verdict v WHERE v.final IS NOT NULL
    ), back AS (
      INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent, flags)
      SELECT v.tenant_id, v.rank, v.invocation_id, v.attempt + 1, v.spent, v.flags & 56 FROM verdict v WHERE v.final IS NULL
    )
    SELECT count(*), count(*) FILTER (WHERE v.final = 'dead'),
        array_agg(v.tenant_id), array_agg(v.invocation_id), array_agg(v.flags),
        array_agg(v.tenant_id) FILTER (WHERE v.final IS NOT NULL), array_agg(v.invocation_id) FILTER (WHERE v.final IS NOT NULL),
        array_agg(v.flags) FILTER (WHERE v.final IS NOT NULL)
      INTO n_items, n_dead, o_t, o_i, o_f, e_t, e_i, e_f FROM verdict v;
    handed_on := handed_on + n_items; given_up := given_up + n_dead;
    DELETE FROM leases l WHERE l.worker_id = w.worker_id AND l.epoch = w.epoch;
    DELETE FROM workers k WHERE k.worker_id = w.worker_id AND k.epoch = w.epoch;
    IF o_t IS NOT NULL THEN PERFORM release_slots(o_t, o_i, o_f); END IF;
    IF e_t IS NOT NULL THEN PERFORM note_ends(e_t, e_i, e_f); END IF;
  END LOOP;
  RETURN NEXT;
END $$;

-- Which tenants may have ready work, by jumping from one to the next in the index: cost grows with tenants, not rows.
-- A tenant at its cap is left out, and rows that a task's or key's cap keeps out are not here but parked: neither's
-- backlog costs anything. `free`: how many more of a capped tenant may run; NULL: any number.
CREATE FUNCTION ready_tenants(p_limit int) RETURNS TABLE (tenant_id uuid, weight int, free int)
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
  WHERE c.cap IS NULL OR c.running < c.cap
$$;

-- Bring parked rows back whose gate has room: after a cap was raised or a task activated, and where the row that a
-- freed slot brought back was cancelled. At most p_limit. What does not fit is parked again by the claim that meets it.
CREATE FUNCTION unpark(p_limit int) RETURNS int
LANGUAGE plpgsql SET search_path = sandbar, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
  g record;
  head record;
  room int;
  n int;
  back int := 0;
BEGIN
  SELECT p.tenant_id, p.scope, p.task_id, p.key INTO g FROM parked p ORDER BY p.tenant_id, p.scope, p.task_id, p.key LIMIT 1;
  WHILE FOUND AND back < p_limit LOOP
    SELECT c.cap, c.running INTO head FROM caps c
      WHERE c.tenant_id = g.tenant_id AND c.scope = g.scope AND c.task_id = g.task_id AND c.key = g.key;
    IF g.scope = 2 THEN
      -- The oldest row says how many of the key may run; of an idle key whose row is gone, all of those.
      SELECT i.concurrency_limit - COALESCE(head.running, 0) INTO room FROM (
          SELECT p.invocation_id FROM parked p WHERE p.tenant_id = g.tenant_id AND p.scope = 2 AND p.task_id = g.task_id AND p.key = g.key
          ORDER BY p.rank, p.invocation_id LIMIT 1) o
        JOIN invocations i ON i.tenant_id = g.tenant_id AND i.invocation_id = o.invocation_id;
    ELSE
      room := CASE WHEN head.cap IS NULL THEN p_limit ELSE head.cap - head.running END;
    END IF;
    IF room > 0 THEN
      WITH out AS (
        SELECT p.tenant_id, p.invocation_id FROM parked p
        WHERE p.tenant_id = g.tenant_id AND p.scope = g.scope AND p.task_id = g.task_id AND p.key = g.key
        ORDER BY p.rank, p.invocation_id LIMIT LEAST(room, p_limit - back) FOR UPDATE SKIP LOCKED
      ), gone AS (
        DELETE FROM parked p USING out o WHERE p.tenant_id = o.tenant_id AND p.invocation_id = o.invocation_id
        RETURNING p.tenant_id, p.rank, p.invocation_id, p.attempt, p.spent, p.flags
      )
      INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent, flags)
        SELECT tenant_id, rank, invocation_id, attempt, spent, flags FROM gone;
      GET DIAGNOSTICS n = ROW_COUNT;
      back := back + n;
    END IF;
    SELECT p.tenant_id, p.scope, p.task_id, p.key INTO g FROM parked p
      WHERE (p.tenant_id, p.scope, p.task_id, p.key) > (g.tenant_id, g.scope, g.task_id, g.key)
      ORDER BY p.tenant_id, p.scope, p.task_id, p.key LIMIT 1;
  END LOOP;
  RETURN back;
END $$;

-- Fold up to p_limit rows of usage_deltas into usage_hours. Returns how many.
CREATE FUNCTION fold_usage(p_limit int) RETURNS bigint
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  WITH picked AS (
    SELECT tenant_id, delta_id FROM usage_deltas ORDER BY tenant_id, delta_id LIMIT p_limit FOR UPDATE SKIP LOCKED
  ), gone AS (
    DELETE FROM usage_deltas d USING picked p WHERE d.tenant_id = p.tenant_id AND d.delta_id = p.delta_id RETURNING d.*
  ), folded AS (
    INSERT INTO usage_hours AS h (tenant_id, task_id, hour, attempts, succeeded, fuel, cpu_ns, wall_ns, input_bytes, output_bytes, log_bytes, egress_bytes)
    SELECT tenant_id, task_id, hour, sum(attempts), sum(succeeded), sum(fuel), sum(cpu_ns), sum(wall_ns), sum(input_bytes), sum(output_bytes),
      sum(log_bytes), sum(egress_bytes)
    FROM gone GROUP BY tenant_id, task_id, hour ORDER BY tenant_id, task_id, hour
    ON CONFLICT (tenant_id, task_id, hour) DO UPDATE SET attempts = h.attempts + excluded.attempts, succeeded = h.succeeded + excluded.succeeded,
      fuel = h.fuel + excluded.fuel, cpu_ns = h.cpu_ns + excluded.cpu_ns, wall_ns = h.wall_ns + excluded.wall_ns,
      input_bytes = h.input_bytes + excluded.input_bytes, output_bytes = h.output_bytes + excluded.output_bytes,
      log_bytes = h.log_bytes + excluded.log_bytes, egress_bytes = h.egress_bytes + excluded.egress_bytes
  )
  SELECT count(*) FROM gone
$$;

-- ---------------------------------------------------------------- caps change

-- Set the cap of a tenant (scope 0) or a task (scope 1); NULL: none. When the thing begins to be counted, what runs of
-- it now is counted and marked so. (A task is counted on after its cap is gone; a tenant, whom every claim meets, is not.)
CREATE FUNCTION set_cap(p_tenant uuid, p_scope smallint, p_task uuid, p_cap int) RETURNS void
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  n int;
BEGIN
  -- Every claim under way commits first, and none begins before we have: nothing runs uncounted.
  PERFORM pg_advisory_xact_lock(7260002);
  IF p_cap IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM caps c WHERE c.tenant_id = p_tenant AND c.scope = p_scope AND c.task_id = p_task AND c.cap IS NOT NULL) THEN
    PERFORM 1 FROM leases l WHERE p_tenant = ANY (l.tenants) ORDER BY l.lease_id FOR UPDATE;
    WITH item AS (
      SELECT l.lease_id, u.o, (COALESCE(u.flags, 0) | CASE WHEN u.tenant_id = p_tenant AND (p_scope = 0 OR i.task_id = p_task)
          AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.tenant_id = u.tenant_id AND a.invocation_id = u.invocation_id AND a.attempt = u.attempt)
        THEN p_scope + 1 ELSE 0 END)::smallint AS flags
      FROM leases l
      CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts, l.flags) WITH ORDINALITY AS u(tenant_id, invocation_id, attempt, flags, o)
      JOIN invocations i ON i.tenant_id = u.tenant_id AND i.invocation_id = u.invocation_id
      WHERE p_tenant = ANY (l.tenants)
    ), marked AS (
      UPDATE leases l SET flags = m.flags
      FROM (SELECT lease_id, array_agg(flags ORDER BY o) AS flags FROM item GROUP BY lease_id) m WHERE l.lease_id = m.lease_id
    )
    SELECT count(*) FILTER (WHERE flags & (p_scope + 1) <> 0) INTO n FROM item;
    INSERT INTO caps AS c (tenant_id, scope, task_id, cap, running) VALUES (p_tenant, p_scope, p_task, p_cap, n)
      ON CONFLICT (tenant_id, scope, task_id, key) DO UPDATE SET cap = p_cap, running = n;
  ELSE
    UPDATE caps c SET cap = p_cap WHERE c.tenant_id = p_tenant AND c.scope = p_scope AND c.task_id = p_task;
  END IF;
  IF p_scope = 1 THEN
    INSERT INTO caps AS c (tenant_id, scope, gated) VALUES (p_tenant, 0, true)
      ON CONFLICT (tenant_id, scope, task_id, key) DO UPDATE SET gated = true WHERE NOT c.gated;
  END IF;
END $$;

CREATE FUNCTION cap_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF TG_TABLE_NAME = 'tenants' THEN
    PERFORM set_cap(NEW.tenant_id, 0::smallint, '00000000-0000-0000-0000-000000000000', NEW.max_concurrency);
  ELSE
    PERFORM set_cap(NEW.tenant_id, 1::smallint, NEW.task_id, CASE WHEN NEW.active THEN NEW.max_concurrency ELSE 0 END);
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER cap_set AFTER INSERT ON tenants FOR EACH ROW WHEN (NEW.max_concurrency IS NOT NULL) EXECUTE FUNCTION cap_changed();
CREATE TRIGGER cap_changed AFTER UPDATE OF max_concurrency ON tenants FOR EACH ROW
  WHEN (OLD.max_concurrency IS DISTINCT FROM NEW.max_concurrency) EXECUTE FUNCTION cap_changed();
CREATE TRIGGER cap_set AFTER INSERT ON tasks FOR EACH ROW
  WHEN (NEW.max_concurrency IS NOT NULL OR NOT NEW.active) EXECUTE FUNCTION cap_changed();
CREATE TRIGGER cap_changed AFTER UPDATE OF max_concurrency, active ON tasks FOR EACH ROW
  WHEN (OLD.max_concurrency IS DISTINCT FROM NEW.max_concurrency OR OLD.active IS DISTINCT FROM NEW.active) EXECUTE FUNCTION cap_changed();

-- ---------------------------------------------------------------- who may what

REVOKE EXECUTE ON FUNCTION rank_of, unqueue, note_ends, release_slots, settle, enqueue, debounce, claim, pass_gates, ack, cancel_invocation,
  promote, expire, reap, ready_tenants, unpark, fold_usage, set_cap, cap_changed FROM PUBLIC;

GRANT SELECT ON caps, parked, unique_keys, dependencies, usage_hours, usage_deltas, queued, usage TO sandbar_api;
GRANT EXECUTE ON FUNCTION rank_of, enqueue, cancel_invocation TO sandbar_api;
GRANT DELETE, UPDATE (rank) ON parked TO sandbar_api; -- change_invocation

GRANT SELECT, INSERT, UPDATE, DELETE ON caps, parked, unique_keys, dependencies, ended, usage_hours, usage_deltas, late_acks TO sandbar_worker;
GRANT SELECT ON queued, usage TO sandbar_worker;
GRANT EXECUTE ON FUNCTION rank_of, unqueue, note_ends, release_slots, settle, claim, pass_gates, ack, promote, expire, reap, ready_tenants,
  unpark, fold_usage TO sandbar_worker;

GRANT SELECT, INSERT, UPDATE, DELETE ON caps, parked, unique_keys, dependencies, ended, ready, scheduled, expiring, cancels TO sandbar_definer;
GRANT SELECT ON queued TO sandbar_definer;
GRANT SELECT, INSERT ON results TO sandbar_definer;
GRANT UPDATE (run_at) ON invocations TO sandbar_definer;
GRANT UPDATE (invocation_id) ON idempotency_keys TO sandbar_definer;
GRANT UPDATE (flags) ON leases TO sandbar_definer;
GRANT EXECUTE ON FUNCTION rank_of, unqueue, note_ends, settle, debounce, set_cap, ready_tenants TO sandbar_definer;
ALTER FUNCTION enqueue OWNER TO sandbar_definer;
ALTER FUNCTION cancel_invocation OWNER TO sandbar_definer;
ALTER FUNCTION cap_changed OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
