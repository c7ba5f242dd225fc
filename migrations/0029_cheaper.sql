-- The same, for less. What each statement of the way costs, and what it cost before, stands in docs/performance.md.

-- The version of every invocation: asked once a statement and not once a row, which was half of what an enqueue took.
-- Only `enqueue` adds invocations, and nothing changes their task or version.
ALTER TABLE invocations DROP CONSTRAINT invocations_tenant_id_task_id_version_fkey;

-- The other side of it: a version that has invocations stays. The lock that `enqueue` takes makes a deletion wait.
CREATE FUNCTION version_is_used() RETURNS trigger
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM invocations i WHERE i.tenant_id = OLD.tenant_id AND i.task_id = OLD.task_id AND i.version = OLD.number) THEN
    RAISE EXCEPTION 'this version has invocations'
      USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'invocations_version';
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER version_is_used AFTER DELETE OR UPDATE OF tenant_id, task_id, number ON versions
  FOR EACH ROW EXECUTE FUNCTION version_is_used();

-- Whether all versions that are meant exist; they stay until the transaction ends. With the rights of the tables' owner,
-- as a foreign key looks: a lock of a row asks for more than a look, and `enqueue` shall not have it.
CREATE FUNCTION hold_versions(p_tenants uuid[], p_tasks uuid[], p_versions int[], p_meant boolean[]) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  RETURN NOT EXISTS (
    SELECT 1 FROM (SELECT DISTINCT u.t, u.k, u.v FROM unnest(p_tenants, p_tasks, p_versions, p_meant) AS u(t, k, v, meant) WHERE u.meant) d
    WHERE NOT EXISTS (
      SELECT 1 FROM versions v WHERE v.tenant_id = d.t AND v.task_id = d.k AND v.number = d.v FOR KEY SHARE));
END $$;
REVOKE EXECUTE ON FUNCTION hold_versions FROM PUBLIC;
GRANT EXECUTE ON FUNCTION hold_versions TO sandbar_definer;

-- The first 48 bits of the id, read as bytes and not as text.
CREATE OR REPLACE FUNCTION accepted_at(p_id uuid) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
AS $$ SELECT LEAST(now(), GREATEST(now() - interval '1 minute', to_timestamp((
  (get_byte(uuid_send(p_id), 0)::bigint << 40) + (get_byte(uuid_send(p_id), 1)::bigint << 32) + (get_byte(uuid_send(p_id), 2)::bigint << 24)
  + (get_byte(uuid_send(p_id), 3) << 16) + (get_byte(uuid_send(p_id), 4) << 8) + get_byte(uuid_send(p_id), 5)) / 1000.0::float8))) $$;

-- Edits, as 0019 made them, so that each function is written once.
CREATE FUNCTION pg_temp.edit(p_function regproc, p_from text, p_to text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  body text := pg_get_functiondef(p_function);
BEGIN
  IF (length(body) - length(replace(body, p_from, ''))) / length(p_from) <> 1 THEN
    RAISE EXCEPTION '% does not say this once: %', p_function, p_from;
  END IF;
  EXECUTE replace(body, p_from, p_to);
END $$;

SELECT pg_temp.edit('enqueue', E'  INSERT INTO invocations (tenant_id', $$  IF NOT hold_versions(p_tenants, p_tasks, p_versions, ok) THEN
    RAISE EXCEPTION 'no such version'
      USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'invocations_version';
  END IF;
  INSERT INTO invocations (tenant_id$$);

-- Most of the time nothing is being cancelled, and many installations have no dependencies at all: one look tells. What
-- is added after that look has its own way: a cancellation finds the end, and an enqueue that depends on it notes it.
SELECT pg_temp.edit('note_ends',
$$  DELETE FROM cancels c USING unnest(p_tenants, p_invocations) u(t, id) WHERE c.tenant_id = u.t AND c.invocation_id = u.id;
$$,
$$  IF EXISTS (SELECT 1 FROM cancels) THEN
    DELETE FROM cancels c USING unnest(p_tenants, p_invocations) u(t, id) WHERE c.tenant_id = u.t AND c.invocation_id = u.id;
  END IF;
  IF NOT EXISTS (SELECT 1 FROM dependencies) THEN
    RETURN 0;
  END IF;
$$);

-- Without statistics, as in the first minute of an installation, the planner joined the invocations by their tenant alone
-- and compared each claimed row with all of them: a claim of 1,000 took 150 ms with 10,000 stored, and more with more. As
-- subqueries of one row each they can be had only one by one, by their keys.
SELECT pg_temp.edit('claim',
$$    JOIN invocations v ON v.tenant_id = u.t AND v.invocation_id = u.i
    JOIN tasks n ON n.tenant_id = v.tenant_id AND n.task_id = v.task_id
    JOIN versions r ON r.tenant_id = v.tenant_id AND r.task_id = v.task_id AND r.number = v.version
    JOIN tenants o ON o.tenant_id = u.t;
$$,
$$    CROSS JOIN LATERAL (SELECT * FROM invocations x WHERE x.tenant_id = u.t AND x.invocation_id = u.i LIMIT 1) v
    CROSS JOIN LATERAL (SELECT x.name FROM tasks x WHERE x.tenant_id = u.t AND x.task_id = v.task_id LIMIT 1) n
    CROSS JOIN LATERAL (
      SELECT x.sha256 FROM versions x WHERE x.tenant_id = u.t AND x.task_id = v.task_id AND x.number = v.version LIMIT 1) r
    CROSS JOIN LATERAL (SELECT x.weight FROM tenants x WHERE x.tenant_id = u.t LIMIT 1) o;
$$);

-- A claim that takes nothing has nothing to keep: it does not wait for the disk. (It writes, for it locks its worker's
-- row; and what it may have parked is ready again after a crash.)
SELECT pg_temp.edit('claim',
$$  IF cardinality(all_t) = 0 THEN RETURN; END IF;
$$,
$$  IF cardinality(all_t) = 0 THEN
    PERFORM set_config('synchronous_commit', 'off', true);
    RETURN;
  END IF;
$$);
