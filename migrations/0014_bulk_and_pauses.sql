-- Bulk operations walk more than once; pauses of a tenant, a task or a tag; dead letters can be deleted for good.
-- After 0002, 0008 and 0009: it uses their places and functions.

ALTER TABLE bulk_operations
  ADD COLUMN passes smallint NOT NULL DEFAULT 0,
  ADD COLUMN expected bigint,          -- counted, or estimated, when it was accepted
  ADD COLUMN expected_exact boolean NOT NULL DEFAULT false;
CREATE INDEX dead_letters_redrivable ON dead_letters (tenant_id, invocation_id) WHERE redriven_as IS NULL;

-- ---------------------------------------------------------------- pauses
--
-- Of a tenant and of a task: its cap is 0 while it lasts, so everything that holds for caps holds: exact, whatever
-- enqueues, promotes or hands on meanwhile; what runs goes on.
-- Of a tag: its rows are parked at a gate of their own (scope 3, cap 0) by the pause and, from then on, by a trigger on
-- `ready`, in the transaction that would have made them ready. Without any pause of a tag the trigger looks into an
-- empty index and does nothing.

CREATE TABLE pauses (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  pause_id   uuid NOT NULL,
  kind       text NOT NULL CHECK (kind IN ('tenant', 'task', 'tag')),
  task_id    uuid,                     -- of a task
  tag_key    text,                     -- of a tag
  tag_value  text,
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, pause_id),
  CHECK ((kind = 'task') = (task_id IS NOT NULL) AND (kind = 'tag') = (tag_key IS NOT NULL AND tag_value IS NOT NULL))
);
CREATE UNIQUE INDEX pauses_what ON pauses (tenant_id, kind, task_id, tag_key, tag_value) NULLS NOT DISTINCT;
CREATE INDEX pauses_tags ON pauses (tenant_id) WHERE kind = 'tag';

ALTER TABLE tenants ADD COLUMN paused boolean NOT NULL DEFAULT false;
ALTER TABLE tasks ADD COLUMN paused boolean NOT NULL DEFAULT false;
ALTER TABLE caps DROP CONSTRAINT caps_scope_check;
ALTER TABLE caps ADD CONSTRAINT caps_scope_check CHECK (scope BETWEEN 0 AND 3); -- 3: a paused tag

CREATE OR REPLACE FUNCTION cap_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF TG_TABLE_NAME = 'tenants' THEN
    PERFORM set_cap(NEW.tenant_id, 0::smallint, '00000000-0000-0000-0000-000000000000',
      CASE WHEN NEW.paused THEN 0 ELSE NEW.max_concurrency END);
  ELSE
    PERFORM set_cap(NEW.tenant_id, 1::smallint, NEW.task_id,
      CASE WHEN NEW.active AND NOT NEW.paused THEN NEW.max_concurrency ELSE 0 END);
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER cap_paused AFTER UPDATE OF paused ON tenants FOR EACH ROW
  WHEN (OLD.paused IS DISTINCT FROM NEW.paused) EXECUTE FUNCTION cap_changed();
CREATE TRIGGER cap_paused AFTER UPDATE OF paused ON tasks FOR EACH ROW
  WHEN (OLD.paused IS DISTINCT FROM NEW.paused) EXECUTE FUNCTION cap_changed();

-- Park those of these rows of `ready` that have a paused tag.
CREATE FUNCTION park_paused(p_tenants uuid[], p_ranks timestamptz[], p_invocations uuid[]) RETURNS int
LANGUAGE plpgsql SET search_path = sandbar, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
  n int;
BEGIN
  WITH held AS MATERIALIZED (
    SELECT u.t, u.r, u.i, p.tag_key || ':' || p.tag_value AS key
    FROM unnest(p_tenants, p_ranks, p_invocations) u(t, r, i)
    JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i
    CROSS JOIN LATERAL (
      SELECT p.tag_key, p.tag_value FROM pauses p
      WHERE p.tenant_id = u.t AND p.kind = 'tag' AND v.tags ->> p.tag_key = p.tag_value LIMIT 1) p
  ), gone AS (
    DELETE FROM ready q USING held h WHERE q.tenant_id = h.t AND q.rank = h.r AND q.invocation_id = h.i
    RETURNING q.tenant_id, q.rank, q.invocation_id, q.attempt, q.spent, q.flags, h.key
  )
  INSERT INTO parked (tenant_id, invocation_id, scope, task_id, key, rank, attempt, spent, flags)
    SELECT tenant_id, invocation_id, 3::smallint, '00000000-0000-0000-0000-000000000000', key, rank, attempt, spent, flags FROM gone;
  GET DIAGNOSTICS n = ROW_COUNT;
  RETURN n;
END $$;

CREATE FUNCTION ready_paused() RETURNS trigger LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM pauses WHERE kind = 'tag') THEN
    PERFORM park_paused(array_agg(n.tenant_id), array_agg(n.rank), array_agg(n.invocation_id)) FROM new_rows n
      WHERE n.tenant_id IN (SELECT p.tenant_id FROM pauses p WHERE p.kind = 'tag');
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER ready_paused AFTER INSERT ON ready REFERENCING NEW TABLE AS new_rows
  FOR EACH STATEMENT EXECUTE FUNCTION ready_paused();

-- Pause something of this session's tenant. p_id is used unless it is paused already. 'unknown': no such task.
CREATE FUNCTION pause(p_id uuid, p_kind text, p_task text, p_key text, p_value text)
RETURNS TABLE (outcome text, pause_id uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  t uuid := current_tenant();
  k uuid;
BEGIN
  IF p_kind = 'task' THEN
    SELECT task_id INTO k FROM tasks WHERE tenant_id = t AND name = p_task AND deleted_at IS NULL;
    IF NOT FOUND THEN RETURN QUERY SELECT 'unknown', NULL::uuid; RETURN; END IF;
  END IF;
  INSERT INTO pauses (tenant_id, pause_id, kind, task_id, tag_key, tag_value) VALUES (t, p_id, p_kind, k, p_key, p_value)
    ON CONFLICT DO NOTHING;
  IF NOT FOUND THEN
    RETURN QUERY SELECT 'paused', p.pause_id FROM pauses p WHERE p.tenant_id = t AND p.kind = p_kind
      AND p.task_id IS NOT DISTINCT FROM k AND p.tag_key IS NOT DISTINCT FROM p_key AND p.tag_value IS NOT DISTINCT FROM p_value;
    RETURN;
  END IF;
  CASE p_kind
    WHEN 'tenant' THEN UPDATE tenants SET paused = true WHERE tenant_id = t;
    WHEN 'task' THEN UPDATE tasks SET paused = true WHERE tenant_id = t AND task_id = k;
    ELSE INSERT INTO caps AS c (tenant_id, scope, key, cap) VALUES (t, 3, p_key || ':' || p_value, 0)
      ON CONFLICT (tenant_id, scope, task_id, key) DO UPDATE SET cap = 0;
  END CASE;
  RETURN QUERY SELECT 'new', p_id;
END $$;

-- After the pause of a tag: park those that were ready before, p_limit rows at a time from (p_rank, p_after) on. NULL:
-- that was the last.
CREATE FUNCTION pause_ready(p_rank timestamptz, p_after uuid, p_limit int) RETURNS TABLE (rank timestamptz, invocation_id uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
  t uuid := current_tenant();
  ranks timestamptz[];
  ids uuid[];
BEGIN
  SELECT array_agg(q.rank ORDER BY q.rank, q.invocation_id), array_agg(q.invocation_id ORDER BY q.rank, q.invocation_id) INTO ranks, ids
    FROM (SELECT q.rank, q.invocation_id FROM ready q WHERE q.tenant_id = t AND (q.rank, q.invocation_id) > (p_rank, p_after)
      ORDER BY q.rank, q.invocation_id LIMIT p_limit) q;
  IF ids IS NULL THEN RETURN; END IF;
  PERFORM park_paused(array_fill(t, ARRAY[cardinality(ids)]), ranks, ids);
  IF cardinality(ids) >= p_limit THEN RETURN QUERY SELECT ranks[cardinality(ids)], ids[cardinality(ids)]; END IF;
END $$;

-- End a pause of this session's tenant. False: there is none. What waited is brought back by the duty `unpark`, what is
-- of a paused tenant by the next claim.
CREATE FUNCTION unpause(p_id uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
  p record;
BEGIN
  DELETE FROM pauses WHERE tenant_id = t AND pause_id = p_id RETURNING kind, task_id, tag_key, tag_value INTO p;
  IF NOT FOUND THEN RETURN false; END IF;
  CASE p.kind
    WHEN 'tenant' THEN UPDATE tenants SET paused = false WHERE tenant_id = t;
    WHEN 'task' THEN UPDATE tasks SET paused = false WHERE tenant_id = t AND task_id = p.task_id;
    ELSE DELETE FROM caps WHERE tenant_id = t AND scope = 3 AND key = p.tag_key || ':' || p.tag_value;
  END CASE;
  RETURN true;
END $$;

-- ---------------------------------------------------------------- purge

-- Delete these invocations of this session's tenant for good, those of them that ended dead. Returns which were.
CREATE FUNCTION purge_dead(p_ids uuid[]) RETURNS SETOF uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp SET enable_seqscan = off AS $$
DECLARE
  t uuid := current_tenant();
  ids uuid[];
BEGIN
  SELECT array_agg(r.invocation_id) INTO ids FROM results r
    WHERE r.tenant_id = t AND r.invocation_id = ANY (p_ids) AND r.state = 'dead';
  IF ids IS NULL THEN RETURN; END IF;
  PERFORM drop_history(t, ids);
  RETURN QUERY SELECT unnest(ids);
END $$;

-- ---------------------------------------------------------------- who may what

ALTER TABLE pauses ENABLE ROW LEVEL SECURITY;
ALTER TABLE pauses FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON pauses TO sandbar_api USING (tenant_id = (SELECT current_tenant())) WITH CHECK (tenant_id = (SELECT current_tenant()));
CREATE POLICY worker ON pauses TO sandbar_worker USING (true) WITH CHECK (true);
CREATE POLICY definer ON pauses TO sandbar_definer USING (true) WITH CHECK (true);
DO $$ BEGIN EXECUTE 'CREATE POLICY owner ON pauses TO CURRENT_USER USING (true) WITH CHECK (true)'; END $$;

REVOKE EXECUTE ON FUNCTION park_paused, ready_paused, pause, pause_ready, unpause, purge_dead FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pause, pause_ready, unpause, purge_dead, duty_check TO sandbar_api;
GRANT EXECUTE ON FUNCTION park_paused TO sandbar_worker, sandbar_definer, sandbar_api;
GRANT SELECT ON pauses TO sandbar_api, sandbar_worker;
GRANT SELECT, INSERT, DELETE ON pauses TO sandbar_definer;
GRANT UPDATE (paused) ON tenants, tasks TO sandbar_definer;
GRANT UPDATE (state, stage, after_rank, after_id, matched, done, skipped, failed, error, not_before, started_at, finished_at, passes)
  ON bulk_operations TO sandbar_api;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION pause OWNER TO sandbar_definer;
ALTER FUNCTION pause_ready OWNER TO sandbar_definer;
ALTER FUNCTION unpause OWNER TO sandbar_definer;
ALTER FUNCTION purge_dead OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
