-- The spine: tenants, tasks, versions, invocations, the queue, workers.
--
-- Invariants every later migration keeps:
--   * tenant_id is the first column of the key of every table of tenant data;
--   * every such table has row-level security ENABLED and FORCED, with a policy for each role that may use it;
--   * an invocation is in exactly one place: `scheduled`, `ready`, an item of a lease, or `results`.
--
-- Roles (cluster-wide, NOLOGIN here; `sandbar dev` gives them passwords, operators may do the same):
--   sandbar_api      the API: sees the tenant of the session setting `sandbar.tenant`, and nothing without it;
--   sandbar_worker   workers and background duties: sees all tenants, may not create tenants or keys;
--   sandbar_definer  owns the few SECURITY DEFINER functions, and never logs in.

DO $$
DECLARE r text;
BEGIN
  FOREACH r IN ARRAY ARRAY['sandbar_api', 'sandbar_worker', 'sandbar_definer'] LOOP
    BEGIN
      EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT NOBYPASSRLS NOCREATEDB NOCREATEROLE', r);
    EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; -- another database of the cluster has it
    END;
    BEGIN
      EXECUTE format('GRANT %I TO CURRENT_USER', r);
    EXCEPTION WHEN OTHERS THEN NULL; -- a concurrent migration of another database did it
    END;
  END LOOP;
END $$;

GRANT USAGE ON SCHEMA sandbar TO sandbar_api, sandbar_worker, sandbar_definer;
-- ALTER FUNCTION … OWNER needs CREATE on the schema; taken back at the end of this file.
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;

-- The tenant of this session; NULL (sees nothing) when unset or reset to ''.
CREATE FUNCTION current_tenant() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
  AS $$ SELECT NULLIF(current_setting('sandbar.tenant', true), '')::uuid $$;

-- ---------------------------------------------------------------- who

CREATE TABLE tenants (
  tenant_id  uuid PRIMARY KEY,
  name       text NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
  weight     int NOT NULL DEFAULT 100 CHECK (weight BETWEEN 1 AND 10000),
  created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_keys (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  key_id     uuid NOT NULL,
  prefix     text NOT NULL,            -- what may be shown: the first 12 characters
  hash       bytea NOT NULL UNIQUE CHECK (octet_length(hash) = 32), -- sha256 of a 256-bit random key
  role       text NOT NULL CHECK (role IN ('admin')),
  created_at timestamptz NOT NULL DEFAULT now(),
  revoked_at timestamptz,
  PRIMARY KEY (tenant_id, key_id)
);

-- ---------------------------------------------------------------- what

CREATE TABLE tasks (
  tenant_id       uuid NOT NULL REFERENCES tenants,
  task_id         uuid NOT NULL,
  name            text NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
  description     text,
  current_version int,                 -- the version plain invocations use: the newest that became ready
  created_at      timestamptz NOT NULL DEFAULT now(),
  updated_at      timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, task_id),
  UNIQUE (tenant_id, name)
);

-- Uploaded bytes by content. A tenant's own: knowing a hash gives nobody another tenant's module.
CREATE TABLE blobs (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  sha256     bytea NOT NULL CHECK (octet_length(sha256) = 32),
  bytes      bytea NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, sha256)
);
ALTER TABLE blobs ALTER COLUMN bytes SET STORAGE EXTERNAL; -- compressing 64 MiB of code costs more than it saves

CREATE TABLE versions (
  tenant_id   uuid NOT NULL,
  task_id     uuid NOT NULL,
  number      int NOT NULL CHECK (number > 0),
  sha256      bytea NOT NULL,
  size_bytes  bigint NOT NULL,
  kind        text NOT NULL CHECK (kind IN ('task', 'command-p1', 'command-p2')),
  state       text NOT NULL CHECK (state IN ('compiling', 'ready', 'rejected')),
  rejection   jsonb,
  manifest    jsonb,
  compile_after timestamptz NOT NULL DEFAULT now(), -- a compiler pushes this ahead while it works: its lease
  created_at  timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, task_id, number),
  UNIQUE (tenant_id, task_id, sha256),
  FOREIGN KEY (tenant_id, task_id) REFERENCES tasks,
  FOREIGN KEY (tenant_id, sha256) REFERENCES blobs
);
CREATE INDEX versions_compiling ON versions (compile_after) WHERE state = 'compiling';

-- ---------------------------------------------------------------- invocations

-- Immutable. Where an invocation is, is said by which of the tables below has it.
CREATE TABLE invocations (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,         -- version 7: order of ids is order of time
  task_id       uuid NOT NULL,
  version       int NOT NULL,
  priority      smallint NOT NULL CHECK (priority BETWEEN -100 AND 100),
  input         bytea NOT NULL,        -- task: its input; command: stdin
  spec          jsonb NOT NULL,        -- input kind, args, env, limits, retry: resolved when accepted
  tags          jsonb NOT NULL,
  run_at        timestamptz,           -- asked for; NULL: at once
  expires_at    timestamptz,           -- not to be started after
  created_at    timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, invocation_id),
  FOREIGN KEY (tenant_id, task_id, version) REFERENCES versions
);
CREATE INDEX invocations_by_task ON invocations (tenant_id, task_id, invocation_id);

CREATE TABLE invocation_tags (
  tenant_id     uuid NOT NULL,
  key           text NOT NULL,
  value         text NOT NULL,
  invocation_id uuid NOT NULL,
  PRIMARY KEY (tenant_id, key, value, invocation_id),
  FOREIGN KEY (tenant_id, invocation_id) REFERENCES invocations
);

CREATE TABLE idempotency_keys (
  tenant_id     uuid NOT NULL,
  key           text NOT NULL,
  fingerprint   bytea NOT NULL,        -- sha256 of task and body: the same key with another body is refused
  invocation_id uuid NOT NULL,
  expires_at    timestamptz NOT NULL,
  PRIMARY KEY (tenant_id, key)
);
CREATE INDEX idempotency_keys_expiry ON idempotency_keys (expires_at);

-- Ready to be claimed. Narrow on purpose: claims delete from it, so it must stay small and hot.
-- rank = -priority, so that one ascending index gives the order of service; ids are time-ordered, so the
-- key is also the way to one invocation's row and no second index is paid for.
CREATE TABLE ready (
  tenant_id     uuid NOT NULL,
  rank          smallint NOT NULL,
  invocation_id uuid NOT NULL,
  attempt       smallint NOT NULL,     -- number the next attempt will have
  spent         smallint NOT NULL,     -- failed attempts that count against the retry policy
  PRIMARY KEY (tenant_id, rank, invocation_id)
) WITH (
  -- A queue's dead rows are all of its rows: vacuum by count, not by share, and without pausing.
  autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000,
  autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.0, autovacuum_analyze_threshold = 100000
);

-- Not yet ready: run_at ahead, or backing off.
CREATE TABLE scheduled (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  due_at        timestamptz NOT NULL,
  rank          smallint NOT NULL,
  attempt       smallint NOT NULL,
  spent         smallint NOT NULL,
  PRIMARY KEY (tenant_id, invocation_id)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX scheduled_due ON scheduled (due_at);

-- Invocations with an expiry that have not finished.
CREATE TABLE expiring (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  expires_at    timestamptz NOT NULL,
  PRIMARY KEY (tenant_id, invocation_id)
);
CREATE INDEX expiring_at ON expiring (expires_at);

-- Cancellation asked for while the invocation was running.
CREATE TABLE cancels (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  requested_at  timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, invocation_id)
);

-- One row per finished attempt, whoever finished it. Its key is the last fence: an attempt ends once.
-- Receipt columns are NULL when nobody lived to count (lease-lost).
CREATE TABLE attempts (
  tenant_id      uuid NOT NULL,
  invocation_id  uuid NOT NULL,
  attempt        smallint NOT NULL,
  worker_id      uuid NOT NULL,
  lease_id       uuid NOT NULL,
  started_at     timestamptz NOT NULL,
  finished_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
  termination    jsonb NOT NULL,       -- {"reason": …} as sandbar_host::outcome::Termination
  fuel bigint, fuel_exact boolean, cpu_ns bigint, wall_ns bigint, peak_memory_bytes bigint,
  input_bytes bigint, output_bytes bigint, output_dropped_bytes bigint,
  log_bytes bigint, log_dropped_bytes bigint, egress_bytes bigint, host_calls bigint,
  backtrace      jsonb,
  PRIMARY KEY (tenant_id, invocation_id, attempt)
);

CREATE TABLE results (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  state         text NOT NULL CHECK (state IN ('succeeded', 'dead', 'cancelled', 'expired')),
  reason        text NOT NULL,         -- termination reason of the last attempt, or why there was none
  output        bytea,
  content_type  text,
  finished_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id, invocation_id)
);
-- Lists of failures must not walk through the successes; successes are found by the primary key.
CREATE INDEX results_unhappy ON results (tenant_id, state, invocation_id) WHERE state <> 'succeeded';

-- Log records as JSON lines. bytea: whatever a guest wrote can never make an insert fail.
CREATE TABLE logs (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  attempt       smallint NOT NULL,
  chunk         int NOT NULL,
  records       bytea NOT NULL,
  PRIMARY KEY (tenant_id, invocation_id, attempt, chunk)
);

-- ---------------------------------------------------------------- hosts

CREATE TABLE workers (
  worker_id    uuid PRIMARY KEY,
  epoch        bigint NOT NULL,        -- random, never from a sequence: a restored database must not repeat one
  host         text NOT NULL,
  version      text NOT NULL,
  slots        int NOT NULL,
  started_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
  heartbeat_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  UNIQUE (worker_id, epoch)
);

-- The right of one worker, in one epoch, to run a batch of attempts. It has no expiry of its own: it lives as
-- long as the worker's row, and the foreign key makes a claim by a worker that was declared dead impossible.
-- Items are arrays (one row per batch is what makes claims cheap); an item is open until its attempt has a row.
CREATE TABLE leases (
  lease_id    uuid PRIMARY KEY,
  worker_id   uuid NOT NULL,
  epoch       bigint NOT NULL,
  claimed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
  open        int NOT NULL,
  tenants     uuid[] NOT NULL,
  invocations uuid[] NOT NULL,
  attempts    smallint[] NOT NULL,
  spent       smallint[] NOT NULL,
  FOREIGN KEY (worker_id, epoch) REFERENCES workers (worker_id, epoch)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX leases_worker ON leases (worker_id, epoch);

-- Background duties: one holder at a time, visible.
CREATE TABLE duties (
  name       text PRIMARY KEY,
  holder     uuid NOT NULL,
  expires_at timestamptz NOT NULL,
  runs       bigint NOT NULL DEFAULT 0,
  last_run_at timestamptz,
  last_error text
);

-- ---------------------------------------------------------------- the queue protocol

-- Enqueue many invocations of many tenants in one statement. The only place where the tenant comes from the
-- row and not from the session, hence SECURITY DEFINER; callers have authenticated each row's tenant.
-- Outcome per row: 'accepted'; 'replayed' (same key, same body: the first invocation's id); 'conflict' (same key,
-- other body).
CREATE FUNCTION enqueue(
  p_tenants uuid[], p_ids uuid[], p_tasks uuid[], p_versions int[], p_priorities smallint[],
  p_inputs bytea[], p_specs jsonb[], p_tags jsonb[], p_run_at timestamptz[], p_expires_at timestamptz[],
  p_keys text[], p_fingerprints bytea[], p_key_ttl interval
) RETURNS TABLE (ord int, outcome text, invocation_id uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  admitted boolean[];
BEGIN
  IF array_position(p_tenants, NULL) IS NOT NULL THEN
    RAISE EXCEPTION 'a row without a tenant' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF p_keys = array_fill(NULL::text, ARRAY[cardinality(p_ids)]) THEN
    admitted := array_fill(true, ARRAY[cardinality(p_ids)]);
  ELSE
    DELETE FROM idempotency_keys k
      USING unnest(p_tenants, p_keys) AS u(tenant_id, key)
      WHERE k.tenant_id = u.tenant_id AND k.key = u.key AND k.expires_at <= now();
    -- Sorted, so that two flushes with the same keys wait for each other and never in a circle.
    INSERT INTO idempotency_keys (tenant_id, key, fingerprint, invocation_id, expires_at)
      SELECT u.tenant_id, u.key, u.fingerprint, u.id, now() + p_key_ttl
      FROM unnest(p_tenants, p_keys, p_fingerprints, p_ids) AS u(tenant_id, key, fingerprint, id)
      WHERE u.key IS NOT NULL ORDER BY u.tenant_id, u.key
      ON CONFLICT DO NOTHING;
    SELECT array_agg(u.key IS NULL OR k.invocation_id = u.id ORDER BY u.o) INTO admitted
      FROM unnest(p_tenants, p_keys, p_ids) WITH ORDINALITY AS u(tenant_id, key, id, o)
      LEFT JOIN idempotency_keys k ON k.tenant_id = u.tenant_id AND k.key = u.key;
  END IF;

  INSERT INTO invocations (tenant_id, invocation_id, task_id, version, priority, input, spec, tags, run_at, expires_at)
    SELECT u.tenant_id, u.id, u.task_id, u.version, u.priority, u.input, u.spec, u.tags, u.run_at, u.expires_at
    FROM unnest(p_tenants, p_ids, p_tasks, p_versions, p_priorities, p_inputs, p_specs, p_tags, p_run_at, p_expires_at, admitted)
      AS u(tenant_id, id, task_id, version, priority, input, spec, tags, run_at, expires_at, ok)
    WHERE u.ok;
  INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent)
    SELECT u.tenant_id, -u.priority, u.id, 1, 0
    FROM unnest(p_tenants, p_ids, p_priorities, p_run_at, admitted) AS u(tenant_id, id, priority, run_at, ok)
    WHERE u.ok AND (u.run_at IS NULL OR u.run_at <= now());
  -- Most flushes have none of these; an empty INSERT still costs its start.
  IF cardinality(array_remove(p_run_at, NULL)) > 0 THEN
    INSERT INTO scheduled (tenant_id, invocation_id, due_at, rank, attempt, spent)
      SELECT u.tenant_id, u.id, u.run_at, -u.priority, 1, 0
      FROM unnest(p_tenants, p_ids, p_priorities, p_run_at, admitted) AS u(tenant_id, id, priority, run_at, ok)
      WHERE u.ok AND u.run_at > now();
  END IF;
  IF cardinality(array_remove(p_expires_at, NULL)) > 0 THEN
    INSERT INTO expiring (tenant_id, invocation_id, expires_at)
      SELECT u.tenant_id, u.id, u.expires_at
      FROM unnest(p_tenants, p_ids, p_expires_at, admitted) AS u(tenant_id, id, expires_at, ok)
      WHERE u.ok AND u.expires_at IS NOT NULL;
  END IF;
  IF cardinality(array_remove(p_tags, '{}')) > 0 THEN
    INSERT INTO invocation_tags (tenant_id, key, value, invocation_id)
      SELECT u.tenant_id, t.key, t.value, u.id
      FROM unnest(p_tenants, p_ids, p_tags, admitted) AS u(tenant_id, id, tags, ok)
      CROSS JOIN LATERAL jsonb_each_text(u.tags) AS t(key, value)
      WHERE u.ok;
  END IF;

  RETURN QUERY
    SELECT u.o::int - 1,
      CASE WHEN u.ok THEN 'accepted' WHEN k.fingerprint = u.fingerprint THEN 'replayed' ELSE 'conflict' END,
      CASE WHEN u.ok THEN u.id ELSE k.invocation_id END
    FROM unnest(p_tenants, p_ids, p_keys, p_fingerprints, admitted) WITH ORDINALITY AS u(tenant_id, id, key, fingerprint, ok, o)
    LEFT JOIN idempotency_keys k ON NOT u.ok AND k.tenant_id = u.tenant_id AND k.key = u.key
    ORDER BY u.o;
END $$;

-- Take up to p_counts[i] ready invocations of p_tenants[i], in order of service, under one new lease.
-- Says nothing about emptiness: under READ COMMITTED with SKIP LOCKED "no rows" proves nothing, so the caller
-- never concludes from it that a tenant has no work. Commits before any guest starts.
-- SQLSTATE 23503 (foreign key) means: this worker, in this epoch, has been declared dead.
-- What the worker needs to run is joined here, within the taking statement and never around the function: a caller's
-- snapshot is older than the one taken here, would not see an invocation committed in between, and would drop what
-- has been taken.
CREATE FUNCTION claim(p_worker uuid, p_epoch bigint, p_lease uuid, p_tenants uuid[], p_counts int[])
RETURNS TABLE (slot int, tenant_id uuid, invocation_id uuid, attempt smallint, spent smallint,
  weight int, task text, sha256 bytea, input bytea, spec jsonb, tags jsonb)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  WITH picked AS MATERIALIZED (
    SELECT r.tenant_id, r.rank, r.invocation_id
    FROM unnest(p_tenants, p_counts) AS want(tenant_id, n)
    CROSS JOIN LATERAL (
      SELECT q.tenant_id, q.rank, q.invocation_id FROM ready q
      WHERE q.tenant_id = want.tenant_id
      ORDER BY q.rank, q.invocation_id LIMIT want.n
      FOR UPDATE SKIP LOCKED
    ) r
  ), taken AS (
    DELETE FROM ready q USING picked p
    WHERE q.tenant_id = p.tenant_id AND q.rank = p.rank AND q.invocation_id = p.invocation_id
    RETURNING q.tenant_id, q.rank, q.invocation_id, q.attempt, q.spent
  ), numbered AS (
    SELECT row_number() OVER (ORDER BY t.rank, t.invocation_id)::int AS slot, t.* FROM taken t
  ), lease AS (
    INSERT INTO leases (lease_id, worker_id, epoch, open, tenants, invocations, attempts, spent)
    SELECT p_lease, p_worker, p_epoch, count(*), array_agg(n.tenant_id ORDER BY n.slot),
      array_agg(n.invocation_id ORDER BY n.slot), array_agg(n.attempt ORDER BY n.slot), array_agg(n.spent ORDER BY n.slot)
    FROM numbered n HAVING count(*) > 0
  )
  SELECT n.slot, n.tenant_id, n.invocation_id, n.attempt, n.spent, o.weight, t.name, v.sha256, i.input, i.spec, i.tags
  FROM numbered n
  JOIN invocations i ON i.tenant_id = n.tenant_id AND i.invocation_id = n.invocation_id
  JOIN tasks t ON t.tenant_id = i.tenant_id AND t.task_id = i.task_id
  JOIN versions v ON v.tenant_id = i.tenant_id AND v.task_id = i.task_id AND v.number = i.version
  JOIN tenants o ON o.tenant_id = n.tenant_id
  ORDER BY n.slot;
END $$;

-- Finish attempts: result, receipt, log, and what comes next, in one transaction and only for items whose lease
-- still stands. Locks the leases first, in order; the reaper takes the same locks, so whoever comes second finds
-- the lease or the item gone and changes nothing. Returns what was accepted, with the state the invocation now has;
-- what is not returned came too late.
--
-- p_verdicts: 'succeeded' | 'dead' | 'cancelled' | 'retry' (again after p_delay_ms, counts against the policy) |
-- 'release' (again after p_delay_ms, does not count: the host's fault, not the guest's).
CREATE FUNCTION ack(
  p_worker uuid, p_epoch bigint,
  p_leases uuid[], p_slots int[], p_tenants uuid[], p_invocations uuid[], p_attempts smallint[],
  p_verdicts text[], p_delay_ms bigint[], p_started_at timestamptz[], p_terminations jsonb[],
  p_fuel bigint[], p_fuel_exact boolean[], p_cpu_ns bigint[], p_wall_ns bigint[], p_peak_memory_bytes bigint[],
  p_input_bytes bigint[], p_output_bytes bigint[], p_output_dropped_bytes bigint[],
  p_log_bytes bigint[], p_log_dropped_bytes bigint[], p_egress_bytes bigint[], p_host_calls bigint[],
  p_backtraces jsonb[], p_outputs bytea[], p_content_types text[], p_logs bytea[]
) RETURNS TABLE (tenant_id uuid, invocation_id uuid, state text)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
BEGIN
  -- The lock. Without it a reaper could hand the item on between our check and our commit.
  PERFORM 1 FROM leases l
    WHERE l.lease_id = ANY (p_leases) AND l.worker_id = p_worker AND l.epoch = p_epoch
    ORDER BY l.lease_id FOR UPDATE;

  RETURN QUERY
  WITH item AS MATERIALIZED (
    SELECT u.*, l.spent[u.slot] AS spent
    FROM unnest(p_leases, p_slots, p_tenants, p_invocations, p_attempts, p_verdicts, p_delay_ms, p_started_at, p_terminations,
        p_fuel, p_fuel_exact, p_cpu_ns, p_wall_ns, p_peak_memory_bytes, p_input_bytes, p_output_bytes, p_output_dropped_bytes,
        p_log_bytes, p_log_dropped_bytes, p_egress_bytes, p_host_calls, p_backtraces, p_outputs, p_content_types, p_logs)
      AS u(lease_id, slot, tenant_id, invocation_id, attempt, verdict, delay_ms, started_at, termination,
        fuel, fuel_exact, cpu_ns, wall_ns, peak_memory_bytes, input_bytes, output_bytes, output_dropped_bytes,
        log_bytes, log_dropped_bytes, egress_bytes, host_calls, backtrace, output, content_type, log)
    JOIN leases l ON l.lease_id = u.lease_id AND l.worker_id = p_worker AND l.epoch = p_epoch
      AND l.tenants[u.slot] = u.tenant_id AND l.invocations[u.slot] = u.invocation_id AND l.attempts[u.slot] = u.attempt
  ), done AS (
    INSERT INTO attempts (tenant_id, invocation_id, attempt, worker_id, lease_id, started_at, termination,
        fuel, fuel_exact, cpu_ns, wall_ns, peak_memory_bytes, input_bytes, output_bytes, output_dropped_bytes,
        log_bytes, log_dropped_bytes, egress_bytes, host_calls, backtrace)
    SELECT i.tenant_id, i.invocation_id, i.attempt, p_worker, i.lease_id, i.started_at, i.termination,
        i.fuel, i.fuel_exact, i.cpu_ns, i.wall_ns, i.peak_memory_bytes, i.input_bytes, i.output_bytes, i.output_dropped_bytes,
        i.log_bytes, i.log_dropped_bytes, i.egress_bytes, i.host_calls, i.backtrace
    FROM item i
    ON CONFLICT DO NOTHING
    RETURNING tenant_id, invocation_id, attempt
  ), accepted AS (
    SELECT i.*,
      -- A cancellation that came while it ran wins over another attempt, not over a result.
      CASE WHEN i.verdict IN ('retry', 'release')
             AND EXISTS (SELECT 1 FROM cancels c WHERE c.tenant_id = i.tenant_id AND c.invocation_id = i.invocation_id)
           THEN 'cancelled' ELSE i.verdict END AS final
    FROM item i JOIN done d ON d.tenant_id = i.tenant_id AND d.invocation_id = i.invocation_id AND d.attempt = i.attempt
  ), result AS (
    INSERT INTO results (tenant_id, invocation_id, state, reason, output, content_type)
    SELECT a.tenant_id, a.invocation_id, a.final,
      CASE a.final WHEN 'cancelled' THEN 'cancelled' ELSE COALESCE(a.termination ->> 'reason', 'unknown') END, a.output, a.content_type
    FROM accepted a WHERE a.final IN ('succeeded', 'dead', 'cancelled')
  ), log AS (
    INSERT INTO logs (tenant_id, invocation_id, attempt, chunk, records)
    SELECT a.tenant_id, a.invocation_id, a.attempt, 0, a.log FROM accepted a WHERE a.log IS NOT NULL
  ), again AS (
    INSERT INTO scheduled (tenant_id, invocation_id, due_at, rank, attempt, spent)
    SELECT a.tenant_id, a.invocation_id, clock_timestamp() + a.delay_ms * interval '1 millisecond', -v.priority,
      a.attempt + 1, a.spent + CASE a.final WHEN 'retry' THEN 1 ELSE 0 END
    FROM accepted a JOIN invocations v ON v.tenant_id = a.tenant_id AND v.invocation_id = a.invocation_id
    WHERE a.final = 'retry' OR (a.final = 'release' AND a.delay_ms > 0)
  ), released AS (
    INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent)
    SELECT a.tenant_id, -v.priority, a.invocation_id, a.attempt + 1, a.spent
    FROM accepted a JOIN invocations v ON v.tenant_id = a.tenant_id AND v.invocation_id = a.invocation_id
    WHERE a.final = 'release' AND a.delay_ms <= 0
  ), uncancelled AS (
    DELETE FROM cancels c USING accepted a
    WHERE a.final IN ('succeeded', 'dead', 'cancelled') AND c.tenant_id = a.tenant_id AND c.invocation_id = a.invocation_id
  ), unexpired AS (
    DELETE FROM expiring e USING accepted a
    WHERE a.final IN ('succeeded', 'dead', 'cancelled') AND e.tenant_id = a.tenant_id AND e.invocation_id = a.invocation_id
  ), closing AS (
    UPDATE leases l SET open = l.open - n.n
    FROM (SELECT a.lease_id, count(*)::int AS n FROM accepted a GROUP BY a.lease_id) n
    WHERE l.lease_id = n.lease_id
  )
  SELECT a.tenant_id, a.invocation_id,
    CASE WHEN a.final = 'retry' OR (a.final = 'release' AND a.delay_ms > 0) THEN 'scheduled'
         WHEN a.final = 'release' THEN 'queued' ELSE a.final END
  FROM accepted a;

  DELETE FROM leases l WHERE l.lease_id = ANY (p_leases) AND l.worker_id = p_worker AND l.epoch = p_epoch AND l.open <= 0;
END $$;

-- Cancel one invocation of this session's tenant. 'cancelled' (it was waiting), 'cancelling' (it runs: its worker
-- will be told), 'finished' (too late), 'unknown'.
CREATE FUNCTION cancel_invocation(p_invocation uuid) RETURNS text
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
  r smallint;
BEGIN
  SELECT -priority INTO r FROM invocations WHERE tenant_id = t AND invocation_id = p_invocation;
  IF NOT FOUND THEN RETURN 'unknown'; END IF;
  -- Each DELETE waits for a claim or promotion in progress; what they took on is found in the next place.
  DELETE FROM scheduled WHERE tenant_id = t AND invocation_id = p_invocation;
  IF NOT FOUND THEN
    DELETE FROM ready WHERE tenant_id = t AND rank = r AND invocation_id = p_invocation;
  END IF;
  IF FOUND THEN
    INSERT INTO results (tenant_id, invocation_id, state, reason) VALUES (t, p_invocation, 'cancelled', 'cancelled');
    DELETE FROM expiring WHERE tenant_id = t AND invocation_id = p_invocation;
    RETURN 'cancelled';
  END IF;
  IF EXISTS (SELECT 1 FROM results WHERE tenant_id = t AND invocation_id = p_invocation) THEN RETURN 'finished'; END IF;
  -- Running, or moving between places right now: whoever moves it next sees this row.
  INSERT INTO cancels (tenant_id, invocation_id) VALUES (t, p_invocation) ON CONFLICT DO NOTHING;
  RETURN 'cancelling';
END $$;

-- Move what is due from `scheduled` to `ready`, at most p_limit; cancelled ones end here.
CREATE FUNCTION promote(p_limit int) RETURNS bigint
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  WITH due AS (
    SELECT tenant_id, invocation_id FROM scheduled WHERE due_at <= clock_timestamp()
    ORDER BY due_at LIMIT p_limit FOR UPDATE SKIP LOCKED
  ), moved AS (
    DELETE FROM scheduled s USING due d WHERE s.tenant_id = d.tenant_id AND s.invocation_id = d.invocation_id
    RETURNING s.tenant_id, s.invocation_id, s.rank, s.attempt, s.spent
  ), stopped AS (
    DELETE FROM cancels c USING moved m WHERE c.tenant_id = m.tenant_id AND c.invocation_id = m.invocation_id
    RETURNING c.tenant_id, c.invocation_id
  ), ended AS (
    INSERT INTO results (tenant_id, invocation_id, state, reason)
    SELECT tenant_id, invocation_id, 'cancelled', 'cancelled' FROM stopped
  ), started AS (
    INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent)
    SELECT m.tenant_id, m.rank, m.invocation_id, m.attempt, m.spent FROM moved m
    WHERE NOT EXISTS (SELECT 1 FROM stopped s WHERE s.tenant_id = m.tenant_id AND s.invocation_id = m.invocation_id)
  )
  SELECT count(*) FROM moved
$$;

-- End waiting invocations whose expiry has passed, at most p_limit. Running ones are left to finish; their row in
-- `expiring` goes with them, so a retry after the expiry ends here too.
CREATE FUNCTION expire(p_limit int) RETURNS TABLE (tenant_id uuid, invocation_id uuid)
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  WITH due AS MATERIALIZED (
    SELECT e.tenant_id, e.invocation_id, -i.priority AS rank
    FROM expiring e JOIN invocations i USING (tenant_id, invocation_id)
    WHERE e.expires_at <= clock_timestamp()
      AND (EXISTS (SELECT 1 FROM ready r WHERE r.tenant_id = e.tenant_id AND r.rank = -i.priority AND r.invocation_id = e.invocation_id)
        OR EXISTS (SELECT 1 FROM scheduled s WHERE s.tenant_id = e.tenant_id AND s.invocation_id = e.invocation_id))
    ORDER BY e.expires_at LIMIT p_limit
  ), a AS (
    DELETE FROM ready r USING due d WHERE r.tenant_id = d.tenant_id AND r.rank = d.rank AND r.invocation_id = d.invocation_id
    RETURNING r.tenant_id, r.invocation_id
  ), b AS (
    DELETE FROM scheduled s USING due d WHERE s.tenant_id = d.tenant_id AND s.invocation_id = d.invocation_id
    RETURNING s.tenant_id, s.invocation_id
  ), gone AS (SELECT * FROM a UNION ALL SELECT * FROM b
  ), cleared AS (
    DELETE FROM expiring e USING gone g WHERE e.tenant_id = g.tenant_id AND e.invocation_id = g.invocation_id
  ), uncancelled AS (
    DELETE FROM cancels c USING gone g WHERE c.tenant_id = g.tenant_id AND c.invocation_id = g.invocation_id
  )
  INSERT INTO results (tenant_id, invocation_id, state, reason)
  SELECT g.tenant_id, g.invocation_id, 'expired', 'expired' FROM gone g
  RETURNING tenant_id, invocation_id
$$;

-- Declare dead every worker silent for p_dead_after and hand its open work on: each open item gets a `lease-lost`
-- attempt without a receipt and goes back to ready under the next number, without using up a retry; an invocation
-- handed on p_max_handovers times is dead (it may be what kills its hosts). p_worker: only that one, at once
-- (a worker that leaves or starts again under its own id). Returns (workers, items handed on).
CREATE FUNCTION reap(p_dead_after interval, p_max_handovers int, p_worker uuid DEFAULT NULL)
RETURNS TABLE (workers bigint, handed_on bigint, given_up bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  w record;
  n_items bigint;
  n_dead bigint;
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
      SELECT l.lease_id, l.claimed_at, u.tenant_id, u.invocation_id, u.attempt, u.spent
      FROM leases l CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts, l.spent) AS u(tenant_id, invocation_id, attempt, spent)
      WHERE l.worker_id = w.worker_id AND l.epoch = w.epoch
        AND NOT EXISTS (SELECT 1 FROM attempts a
          WHERE a.tenant_id = u.tenant_id AND a.invocation_id = u.invocation_id AND a.attempt = u.attempt)
    ), lost AS (
      INSERT INTO attempts (tenant_id, invocation_id, attempt, worker_id, lease_id, started_at, termination)
      SELECT o.tenant_id, o.invocation_id, o.attempt, w.worker_id, o.lease_id, o.claimed_at, '{"reason": "lease-lost"}'
      FROM open o
    ), stopped AS (
      DELETE FROM cancels c USING open o WHERE c.tenant_id = o.tenant_id AND c.invocation_id = o.invocation_id
      RETURNING c.tenant_id, c.invocation_id
    ), verdict AS MATERIALIZED (
      SELECT o.*, -i.priority AS rank,
        CASE WHEN s.invocation_id IS NOT NULL THEN 'cancelled'
             WHEN o.attempt - o.spent > p_max_handovers THEN 'dead' END AS final
      FROM open o JOIN invocations i USING (tenant_id, invocation_id)
      LEFT JOIN stopped s USING (tenant_id, invocation_id)
    ), ended AS (
      INSERT INTO results (tenant_id, invocation_id, state, reason)
      SELECT v.tenant_id, v.invocation_id, v.final, CASE v.final WHEN 'cancelled' THEN 'cancelled' ELSE 'lease-lost' END
      FROM verdict v WHERE v.final IS NOT NULL
    ), unexpired AS (
      DELETE FROM expiring e USING verdict v
      WHERE v.final IS NOT NULL AND e.tenant_id = v.tenant_id AND e.invocation_id = v.invocation_id
    ), back AS (
      INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent)
      SELECT v.tenant_id, v.rank, v.invocation_id, v.attempt + 1, v.spent FROM verdict v WHERE v.final IS NULL
    )
    SELECT count(*), count(*) FILTER (WHERE v.final = 'dead') INTO n_items, n_dead FROM verdict v;
    handed_on := handed_on + n_items; given_up := given_up + n_dead;
    DELETE FROM leases l WHERE l.worker_id = w.worker_id AND l.epoch = w.epoch;
    DELETE FROM workers k WHERE k.worker_id = w.worker_id AND k.epoch = w.epoch;
  END LOOP;
  RETURN NEXT;
END $$;

-- Which tenants may have ready work, by jumping from one to the next in the index: cost grows with tenants, not rows.
CREATE FUNCTION ready_tenants(p_limit int) RETURNS TABLE (tenant_id uuid, weight int)
LANGUAGE sql STABLE SET search_path = sandbar, pg_temp AS $$
  WITH RECURSIVE jump AS (
    (SELECT r.tenant_id, 1 AS n FROM ready r ORDER BY r.tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.tenant_id FROM ready r WHERE r.tenant_id > j.tenant_id ORDER BY r.tenant_id LIMIT 1), j.n + 1
    FROM jump j WHERE j.tenant_id IS NOT NULL AND j.n < p_limit
  )
  SELECT t.tenant_id, t.weight FROM jump j JOIN tenants t ON t.tenant_id = j.tenant_id
$$;

-- Who is behind a key, by the hash of the key. The API calls it before it knows a tenant, hence SECURITY DEFINER.
CREATE FUNCTION authenticate_key(p_hash bytea) RETURNS TABLE (tenant_id uuid, key_id uuid, role text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT k.tenant_id, k.key_id, k.role FROM api_keys k WHERE k.hash = p_hash AND k.revoked_at IS NULL
$$;

-- The attempts that run now, of this session's tenant: leases mix tenants, so the API may not read them itself.
CREATE FUNCTION running_attempts(p_invocations uuid[] DEFAULT NULL)
RETURNS TABLE (invocation_id uuid, attempt smallint, worker_id uuid, started_at timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT u.invocation_id, u.attempt, l.worker_id, l.claimed_at
  FROM leases l CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts) AS u(tenant_id, invocation_id, attempt)
  WHERE u.tenant_id = current_tenant() AND (p_invocations IS NULL OR u.invocation_id = ANY (p_invocations))
    AND NOT EXISTS (SELECT 1 FROM attempts a
      WHERE a.tenant_id = u.tenant_id AND a.invocation_id = u.invocation_id AND a.attempt = u.attempt)
$$;

-- ---------------------------------------------------------------- who may what

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['tenants', 'api_keys', 'tasks', 'blobs', 'versions', 'invocations', 'invocation_tags',
      'idempotency_keys', 'ready', 'scheduled', 'expiring', 'cancels', 'attempts', 'results', 'logs'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY worker ON %I TO sandbar_worker USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY definer ON %I TO sandbar_definer USING (true) WITH CHECK (true)', t);
    -- Migrations and `sandbar dev` act as the owner, who is under FORCE as well unless a superuser.
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA sandbar FROM PUBLIC;
GRANT EXECUTE ON FUNCTION current_tenant TO sandbar_api, sandbar_worker, sandbar_definer;

GRANT SELECT ON tenants, blobs, versions, tasks, invocations, invocation_tags, ready, scheduled, cancels, attempts,
  results, logs, expiring TO sandbar_api;
GRANT INSERT ON tasks, blobs, versions TO sandbar_api;
GRANT UPDATE (description, current_version, updated_at) ON tasks TO sandbar_api;
GRANT INSERT ON results, cancels TO sandbar_api;      -- cancel_invocation
GRANT DELETE ON ready, scheduled, expiring TO sandbar_api;
GRANT EXECUTE ON FUNCTION enqueue, cancel_invocation, authenticate_key, running_attempts TO sandbar_api;

GRANT SELECT ON tenants, tasks, versions, blobs, invocations, invocation_tags TO sandbar_worker;
GRANT UPDATE (state, rejection, compile_after) ON versions TO sandbar_worker;
GRANT UPDATE (current_version, updated_at) ON tasks TO sandbar_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON ready, scheduled, expiring, cancels, attempts, results, logs, leases, workers, duties,
  idempotency_keys TO sandbar_worker;
GRANT EXECUTE ON FUNCTION claim, ack, promote, expire, reap, ready_tenants TO sandbar_worker;

GRANT SELECT ON api_keys, leases, attempts TO sandbar_definer;
GRANT SELECT, INSERT, DELETE ON idempotency_keys TO sandbar_definer;
GRANT SELECT, INSERT ON invocations, invocation_tags, ready, scheduled, expiring TO sandbar_definer;
GRANT SELECT ON versions, tenants, tasks, blobs TO sandbar_definer;
ALTER FUNCTION enqueue OWNER TO sandbar_definer;
ALTER FUNCTION authenticate_key OWNER TO sandbar_definer;
ALTER FUNCTION running_attempts OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
