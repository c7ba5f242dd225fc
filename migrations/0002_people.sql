-- What people change: tasks (defaults, active, pinned version, deletion) and invocations that wait (priority, time,
-- tags); and what they see of a running attempt (live log, progress).

-- ---------------------------------------------------------------- tasks

ALTER TABLE tasks
  ADD COLUMN active boolean NOT NULL DEFAULT true, -- false: nothing new is accepted
  ADD COLUMN limits jsonb,                         -- defaults of its invocations, over the module's own; NULL: none
  ADD COLUMN retry jsonb,                          -- the same
  ADD COLUMN pinned_version int,                   -- in place of current_version
  ADD COLUMN described boolean NOT NULL DEFAULT false, -- a person wrote the description: uploads leave it alone
  ADD COLUMN deleted_at timestamptz;               -- the row stays for the invocations that ended; the name is free

ALTER TABLE tasks DROP CONSTRAINT tasks_tenant_id_name_key;
CREATE UNIQUE INDEX tasks_name ON tasks (tenant_id, name) WHERE deleted_at IS NULL;
CREATE INDEX tasks_by_any_name ON tasks (tenant_id, name);

-- Bytes that no task needs any more are emptied, not dropped: versions refer to the row.
ALTER TABLE blobs ADD COLUMN freed_at timestamptz;
-- Set when the modules of a deleted task have been looked at.
ALTER TABLE tasks ADD COLUMN freed_at timestamptz;
CREATE INDEX tasks_to_free ON tasks (deleted_at) WHERE deleted_at IS NOT NULL AND freed_at IS NULL;

-- Delete a task of this session's tenant. 'unknown'; 'in-use': it has open invocations and p_cancel is false;
-- 'more': p_limit of them were cancelled, call again; 'deleted'. With p_cancel nothing new is accepted from the first
-- call on. Running ones are asked to stop and end by themselves.
CREATE FUNCTION delete_task(p_name text, p_cancel boolean, p_limit int)
RETURNS TABLE (outcome text, ended uuid[], stopping uuid[])
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
  k uuid;
  open uuid[];
  id uuid;
BEGIN
  ended := '{}'; stopping := '{}';
  SELECT task_id INTO k FROM tasks WHERE tenant_id = t AND name = p_name AND deleted_at IS NULL FOR NO KEY UPDATE;
  IF NOT FOUND THEN outcome := 'unknown'; RETURN NEXT; RETURN; END IF;
  -- Without a result, and not asked to stop yet.
  SELECT array_agg(o.invocation_id) INTO open FROM (
    SELECT i.invocation_id FROM invocations i
    WHERE i.tenant_id = t AND i.task_id = k
      AND NOT EXISTS (SELECT 1 FROM results r WHERE r.tenant_id = t AND r.invocation_id = i.invocation_id)
      AND NOT (p_cancel AND EXISTS (SELECT 1 FROM cancels c WHERE c.tenant_id = t AND c.invocation_id = i.invocation_id))
    LIMIT CASE WHEN p_cancel THEN p_limit ELSE 1 END) o;
  IF open IS NOT NULL AND NOT p_cancel THEN outcome := 'in-use'; RETURN NEXT; RETURN; END IF;
  FOREACH id IN ARRAY COALESCE(open, '{}') LOOP
    CASE cancel_invocation(id)
      WHEN 'cancelled' THEN ended := ended || id;
      WHEN 'cancelling' THEN stopping := stopping || id;
      ELSE NULL;
    END CASE;
  END LOOP;
  IF cardinality(open) >= p_limit THEN
    UPDATE tasks SET active = false, updated_at = clock_timestamp() WHERE tenant_id = t AND task_id = k;
    outcome := 'more'; RETURN NEXT; RETURN;
  END IF;
  UPDATE tasks SET active = false, deleted_at = clock_timestamp(), updated_at = clock_timestamp()
    WHERE tenant_id = t AND task_id = k;
  outcome := 'deleted';
  RETURN NEXT;
END $$;

-- Empty the modules that only tasks deleted longer than p_after ago refer to; looks at p_limit tasks. The wait is for
-- servers that still remember the task, and for what they accepted meanwhile. Returns how many tasks it looked at.
CREATE FUNCTION free_modules(p_after interval, p_limit int) RETURNS bigint
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE
  k record;
  n bigint := 0;
BEGIN
  FOR k IN
    SELECT x.tenant_id, x.task_id FROM tasks x
    WHERE x.deleted_at < clock_timestamp() - p_after AND x.freed_at IS NULL
      AND NOT EXISTS (SELECT 1 FROM invocations i WHERE i.tenant_id = x.tenant_id AND i.task_id = x.task_id
        AND NOT EXISTS (SELECT 1 FROM results r WHERE r.tenant_id = i.tenant_id AND r.invocation_id = i.invocation_id))
    ORDER BY x.deleted_at LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
  LOOP
    n := n + 1;
    -- An upload of the same bytes holds a lock on the row until its version is there: lock first, look afterwards.
    PERFORM 1 FROM blobs b WHERE b.tenant_id = k.tenant_id
      AND b.sha256 IN (SELECT v.sha256 FROM versions v WHERE v.tenant_id = k.tenant_id AND v.task_id = k.task_id)
      ORDER BY b.sha256 FOR NO KEY UPDATE;
    UPDATE blobs b SET bytes = '', freed_at = clock_timestamp()
      WHERE b.tenant_id = k.tenant_id AND b.freed_at IS NULL
        AND b.sha256 IN (SELECT v.sha256 FROM versions v WHERE v.tenant_id = k.tenant_id AND v.task_id = k.task_id)
        AND NOT EXISTS (SELECT 1 FROM versions v JOIN tasks x USING (tenant_id, task_id)
          WHERE v.tenant_id = b.tenant_id AND v.sha256 = b.sha256 AND x.freed_at IS NULL
            AND (x.tenant_id, x.task_id) <> (k.tenant_id, k.task_id));
    UPDATE tasks x SET freed_at = clock_timestamp() WHERE x.tenant_id = k.tenant_id AND x.task_id = k.task_id;
  END LOOP;
  RETURN n;
END $$;

-- ---------------------------------------------------------------- invocations

-- Change one invocation of this session's tenant while it waits; its tags at any time. What is NULL or false stays.
-- 'ready': changed, and it may be claimed now; 'changed'; 'unknown'; 'started'; 'finished'; 'tags': there would be
-- more than p_max_tags; 'expiry': p_run_at is not before its expiry. Only 'ready' and 'changed' have changed anything.
--
-- Changes of one invocation follow each other (the lock on its row); what moves it meanwhile is waited for, place by
-- place in the order of moves, and whoever took it has it: a claimed one is 'started', whatever was asked. It never
-- leaves one place without entering the next in the same transaction.
--
-- The other half of what is known about `ready` here: rank = -priority, in it, in `scheduled` and by `invocations`.
-- A migration that changes places or rank redefines this function.
CREATE FUNCTION change_invocation(p_invocation uuid, p_priority smallint, p_set_run_at boolean, p_run_at timestamptz,
  p_reset_tags boolean, p_tags jsonb, p_max_tags int) RETURNS text
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
  i record;
  w record;
  new_tags jsonb;
  new_rank smallint;
  later boolean := p_set_run_at AND COALESCE(p_run_at > clock_timestamp(), false);
  outcome text := 'changed';
BEGIN
  SELECT priority, tags, expires_at INTO i FROM invocations
    WHERE tenant_id = t AND invocation_id = p_invocation FOR NO KEY UPDATE;
  IF NOT FOUND THEN RETURN 'unknown'; END IF;
  new_tags := jsonb_strip_nulls(CASE WHEN p_reset_tags THEN '{}' ELSE i.tags END || COALESCE(p_tags, '{}'));
  IF (SELECT count(*) FROM jsonb_object_keys(new_tags)) > p_max_tags THEN RETURN 'tags'; END IF;
  IF later AND i.expires_at <= p_run_at THEN RETURN 'expiry'; END IF;

  IF p_priority IS NOT NULL OR p_set_run_at THEN
    new_rank := -COALESCE(p_priority, i.priority);
    SELECT attempt, spent, due_at INTO w FROM scheduled WHERE tenant_id = t AND invocation_id = p_invocation FOR UPDATE;
    IF FOUND THEN
      -- One that somebody wants cancelled is left to the promotion, which ends it.
      IF p_set_run_at AND NOT later
        AND NOT EXISTS (SELECT 1 FROM cancels WHERE tenant_id = t AND invocation_id = p_invocation) THEN
        DELETE FROM scheduled WHERE tenant_id = t AND invocation_id = p_invocation;
        INSERT INTO ready (tenant_id, rank, invocation_id, attempt, spent)
          VALUES (t, new_rank, p_invocation, w.attempt, w.spent);
        outcome := 'ready';
      ELSE
        UPDATE scheduled SET rank = new_rank,
            due_at = CASE WHEN NOT p_set_run_at THEN due_at WHEN later THEN p_run_at ELSE clock_timestamp() END
          WHERE tenant_id = t AND invocation_id = p_invocation;
      END IF;
    ELSE
      SELECT attempt, spent INTO w FROM ready
        WHERE tenant_id = t AND rank = -i.priority AND invocation_id = p_invocation FOR UPDATE;
      IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT 1 FROM results WHERE tenant_id = t AND invocation_id = p_invocation)
          THEN 'finished' ELSE 'started' END;
      ELSIF later THEN
        DELETE FROM ready WHERE tenant_id = t AND rank = -i.priority AND invocation_id = p_invocation;
        INSERT INTO scheduled (tenant_id, invocation_id, due_at, rank, attempt, spent)
          VALUES (t, p_invocation, p_run_at, new_rank, w.attempt, w.spent);
      ELSE
        UPDATE ready SET rank = new_rank WHERE tenant_id = t AND rank = -i.priority AND invocation_id = p_invocation;
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

-- ---------------------------------------------------------------- live

-- What a running attempt has logged so far, in pieces; always a beginning of its log. The ack brings the whole log as
-- chunk 0 of `logs`, so readers look here only for attempts that have no row there: those that run, and those whose
-- host or cell was lost. settle_live moves the latter to `logs` and drops the rest.
CREATE TABLE live_logs (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  attempt       smallint NOT NULL,
  first         int NOT NULL,          -- number of its first record in the attempt's log, from 0
  records       bytea NOT NULL,        -- JSON lines, as in `logs`
  started_at    timestamptz NOT NULL,  -- of the attempt, as its ack will say
  written_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id, invocation_id, attempt, first)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX live_logs_written ON live_logs (written_at);

-- The latest report of progress, kept after the end.
CREATE TABLE progress (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  attempt       smallint NOT NULL,
  report        jsonb NOT NULL,        -- done, total (0: unknown), message
  at            timestamptz NOT NULL,
  PRIMARY KEY (tenant_id, invocation_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

-- Write what attempts of this worker's leases said while they ran. A log whose lease is gone, or whose attempt has
-- ended, is left out; a report also counts when its attempt has ended by an ack under this lease, which may have been
-- quicker. It takes no lock on the lease, so that no ack ever waits for it: an attempt that is lost in the very moment
-- may still get its last words in, under its own number, where they belong.
-- p_first NULL: no log; p_reports NULL: no progress.
CREATE FUNCTION write_live(p_worker uuid, p_epoch bigint, p_leases uuid[], p_slots int[], p_tenants uuid[],
  p_invocations uuid[], p_attempts smallint[], p_first int[], p_records bytea[], p_started_at timestamptz[],
  p_reports jsonb[], p_at timestamptz[]) RETURNS int
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  WITH item AS MATERIALIZED (
    SELECT u.*, l.lease_id IS NOT NULL AND a.attempt IS NULL AS runs,
      a.lease_id = u.lease_id AND a.worker_id = p_worker AND a.termination ->> 'reason' <> 'lease-lost' AS ended
    FROM unnest(p_leases, p_slots, p_tenants, p_invocations, p_attempts, p_first, p_records, p_started_at, p_reports, p_at)
      AS u(lease_id, slot, tenant_id, invocation_id, attempt, first, records, started_at, report, at)
    LEFT JOIN leases l ON l.lease_id = u.lease_id AND l.worker_id = p_worker AND l.epoch = p_epoch
      AND l.tenants[u.slot] = u.tenant_id AND l.invocations[u.slot] = u.invocation_id AND l.attempts[u.slot] = u.attempt
    LEFT JOIN attempts a ON a.tenant_id = u.tenant_id AND a.invocation_id = u.invocation_id AND a.attempt = u.attempt
  ), log AS (
    INSERT INTO live_logs (tenant_id, invocation_id, attempt, first, records, started_at)
    SELECT tenant_id, invocation_id, attempt, first, records, started_at FROM item WHERE first IS NOT NULL AND runs
    ON CONFLICT DO NOTHING
  ), report AS (
    INSERT INTO progress AS p (tenant_id, invocation_id, attempt, report, at)
    SELECT tenant_id, invocation_id, attempt, report, at FROM item WHERE report IS NOT NULL AND (runs OR ended)
    ORDER BY tenant_id, invocation_id
    ON CONFLICT (tenant_id, invocation_id) DO UPDATE
      SET attempt = EXCLUDED.attempt, report = EXCLUDED.report, at = EXCLUDED.at
      WHERE (p.attempt, p.at) < (EXCLUDED.attempt, EXCLUDED.at)
  )
  SELECT count(*)::int FROM item WHERE runs OR ended
$$;

-- Take live pieces of attempts that have ended out of the way, at most p_limit: those without a row in `logs` become
-- rows there. Returns how many it took.
CREATE FUNCTION settle_live(p_limit int) RETURNS bigint
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  WITH old AS MATERIALIZED (
    SELECT l.tenant_id, l.invocation_id, l.attempt, l.first FROM live_logs l
    WHERE EXISTS (SELECT 1 FROM attempts a
      WHERE a.tenant_id = l.tenant_id AND a.invocation_id = l.invocation_id AND a.attempt = l.attempt)
    ORDER BY l.written_at LIMIT p_limit FOR UPDATE SKIP LOCKED
  ), gone AS (
    DELETE FROM live_logs l USING old o
    WHERE l.tenant_id = o.tenant_id AND l.invocation_id = o.invocation_id AND l.attempt = o.attempt AND l.first = o.first
    RETURNING l.*
  ), kept AS (
    -- From 1 on: 0 is the ack's. The number of the first record keeps the order.
    INSERT INTO logs (tenant_id, invocation_id, attempt, chunk, records)
    SELECT g.tenant_id, g.invocation_id, g.attempt, g.first + 1, g.records FROM gone g
    WHERE NOT EXISTS (SELECT 1 FROM logs k
      WHERE k.tenant_id = g.tenant_id AND k.invocation_id = g.invocation_id AND k.attempt = g.attempt AND k.chunk = 0)
    ON CONFLICT DO NOTHING
  )
  SELECT count(*) FROM gone
$$;

-- ---------------------------------------------------------------- who may what

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['live_logs', 'progress'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY worker ON %I TO sandbar_worker USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY definer ON %I TO sandbar_definer USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

REVOKE EXECUTE ON FUNCTION delete_task, free_modules, change_invocation, write_live, settle_live FROM PUBLIC;
GRANT EXECUTE ON FUNCTION delete_task, change_invocation TO sandbar_api;
GRANT EXECUTE ON FUNCTION free_modules, write_live, settle_live TO sandbar_worker;

GRANT UPDATE (active, limits, retry, pinned_version, described, deleted_at) ON tasks TO sandbar_api;
GRANT UPDATE (bytes, freed_at) ON blobs TO sandbar_api;            -- an upload of freed bytes fills them again
GRANT UPDATE (priority, run_at, tags) ON invocations TO sandbar_api;
GRANT INSERT, DELETE ON invocation_tags TO sandbar_api;
GRANT INSERT ON ready, scheduled TO sandbar_api;
GRANT UPDATE (rank) ON ready TO sandbar_api;
GRANT UPDATE (rank, due_at) ON scheduled TO sandbar_api;
GRANT SELECT ON live_logs, progress TO sandbar_api;

GRANT UPDATE (freed_at) ON tasks TO sandbar_worker;
GRANT UPDATE (bytes, freed_at) ON blobs TO sandbar_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON live_logs, progress TO sandbar_worker;
