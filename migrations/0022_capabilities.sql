-- Capabilities of running attempts: what a guest asks of the database through its worker, and the key-value stores of tasks.
--
-- Each call checks in its own statement that the attempt is still this worker's and that its task has the grant. One that
-- writes holds the lease's row until it has committed, so an ack or a reaper waits for it, and it for them: after the end
-- of an attempt nothing of it is written any more.
--
-- Lock order of a write: the tenant's row of kv_usage, the lease, rows of kv. Nobody who holds a lease waits for kv_usage.

-- What a task keeps from one invocation to the next. version: never used twice, also after a key was taken away.
CREATE TABLE kv (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  task_id    uuid NOT NULL,
  key        text COLLATE "C" NOT NULL CHECK (octet_length(key) BETWEEN 1 AND 256),
  value      bytea NOT NULL,
  version    bigint NOT NULL CHECK (version > 0),
  updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id, task_id, key)
);
CREATE SEQUENCE kv_versions;

-- What all keys of a tenant take: their own bytes, those of their values, and 64 for each.
CREATE TABLE kv_usage (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  keys       bigint NOT NULL DEFAULT 0 CHECK (keys >= 0),
  bytes      bigint NOT NULL DEFAULT 0 CHECK (bytes >= 0),
  PRIMARY KEY (tenant_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['kv', 'kv_usage'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY worker ON %I TO sandbar_worker USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

-- An attempt as its worker names it.
CREATE TYPE attempt_name AS (worker_id uuid, epoch bigint, lease_id uuid, slot int, tenant_id uuid, invocation_id uuid, attempt smallint);

-- The task of an attempt that is this worker's, and what it has been given. No row: it is not, or has ended. With p_hold it
-- stays so until the end of the transaction.
CREATE FUNCTION attempt_task(a attempt_name, p_hold boolean, OUT task_id uuid, OUT grants jsonb) RETURNS SETOF record
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF p_hold THEN
    PERFORM 1 FROM leases l WHERE l.lease_id = a.lease_id AND l.worker_id = a.worker_id AND l.epoch = a.epoch
      AND l.tenants[a.slot] = a.tenant_id AND l.invocations[a.slot] = a.invocation_id AND l.attempts[a.slot] = a.attempt FOR SHARE;
  ELSE
    PERFORM 1 FROM leases l WHERE l.lease_id = a.lease_id AND l.worker_id = a.worker_id AND l.epoch = a.epoch
      AND l.tenants[a.slot] = a.tenant_id AND l.invocations[a.slot] = a.invocation_id AND l.attempts[a.slot] = a.attempt;
  END IF;
  IF NOT FOUND THEN RETURN; END IF;
  -- In a statement of its own: what an ack committed while we waited for the lease is seen.
  RETURN QUERY SELECT i.task_id, COALESCE(t.grants, '{}') FROM invocations i
    JOIN tasks t ON t.tenant_id = i.tenant_id AND t.task_id = i.task_id AND t.deleted_at IS NULL
    WHERE i.tenant_id = a.tenant_id AND i.invocation_id = a.invocation_id AND NOT EXISTS (SELECT 1 FROM attempts x
      WHERE x.tenant_id = a.tenant_id AND x.invocation_id = a.invocation_id AND x.attempt = a.attempt);
END $$;

-- Read values of a store. outcome: 'ok', 'lost', 'denied', 'large' (the values have more than p_max_bytes together). One
-- row with the outcome and no key, and one for each key that is there. Without p_values only versions.
CREATE FUNCTION kv_read(a attempt_name, p_keys text[], p_values boolean, p_max_bytes bigint)
RETURNS TABLE (outcome text, key text, value bytea, version bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE h record;
BEGIN
  SELECT * INTO h FROM attempt_task(a, false);
  IF NOT FOUND THEN RETURN QUERY SELECT 'lost', NULL::text, NULL::bytea, NULL::bigint; RETURN; END IF;
  IF (h.grants ->> 'kv') IS DISTINCT FROM 'true' THEN RETURN QUERY SELECT 'denied', NULL::text, NULL::bytea, NULL::bigint; RETURN; END IF;
  -- octet_length does not fetch what lies outside of its row.
  IF p_values AND (SELECT sum(octet_length(k.value)) FROM kv k
      WHERE k.tenant_id = a.tenant_id AND k.task_id = h.task_id AND k.key = ANY (p_keys)) > p_max_bytes THEN
    RETURN QUERY SELECT 'large', NULL::text, NULL::bytea, NULL::bigint; RETURN;
  END IF;
  RETURN QUERY SELECT 'ok', NULL::text, NULL::bytea, NULL::bigint
    UNION ALL SELECT 'ok', k.key, CASE WHEN p_values THEN k.value END, k.version FROM kv k
      WHERE k.tenant_id = a.tenant_id AND k.task_id = h.task_id AND k.key = ANY (p_keys);
END $$;

-- Keys of a store behind p_after, in the order of their bytes; NULL: of no attempt or without the grant, as p_outcome says.
CREATE FUNCTION kv_list(a attempt_name, p_after text, p_limit int, OUT outcome text, OUT keys text[])
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE h record;
BEGIN
  SELECT * INTO h FROM attempt_task(a, false);
  IF NOT FOUND THEN outcome := 'lost'; RETURN; END IF;
  IF (h.grants ->> 'kv') IS DISTINCT FROM 'true' THEN outcome := 'denied'; RETURN; END IF;
  outcome := 'ok';
  SELECT COALESCE(array_agg(x.key), '{}') INTO keys FROM (SELECT k.key FROM kv k
    WHERE k.tenant_id = a.tenant_id AND k.task_id = h.task_id AND k.key > p_after COLLATE "C" ORDER BY k.key LIMIT p_limit) x;
END $$;

-- Begin a write: the tenant's row is ours, then the lease. outcome as kv_read.
CREATE FUNCTION kv_begin(a attempt_name, OUT outcome text, OUT task_id uuid, OUT bytes bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE h record;
BEGIN
  SELECT u.bytes INTO bytes FROM kv_usage u WHERE u.tenant_id = a.tenant_id FOR UPDATE;
  IF NOT FOUND THEN
    INSERT INTO kv_usage (tenant_id) VALUES (a.tenant_id) ON CONFLICT DO NOTHING;
    SELECT u.bytes INTO bytes FROM kv_usage u WHERE u.tenant_id = a.tenant_id FOR UPDATE;
  END IF;
  SELECT * INTO h FROM attempt_task(a, true);
  IF NOT FOUND THEN outcome := 'lost'; RETURN; END IF;
  task_id := h.task_id;
  outcome := CASE WHEN h.grants ->> 'kv' = 'true' THEN 'ok' ELSE 'denied' END;
END $$;

-- What a tenant may store: its own word, its plan's, or the configuration's.
CREATE FUNCTION kv_limit(p_tenant uuid, p_default bigint) RETURNS bigint
LANGUAGE sql STABLE SET search_path = sandbar, pg_temp AS $$
  SELECT CASE said.amount WHEN 'unlimited' THEN 9223372036854775807 ELSE COALESCE(said.amount::bigint, p_default) END
  FROM (SELECT COALESCE(
    (SELECT q.quotas ->> 'kv_bytes' FROM quotas q WHERE q.tenant_id = p_tenant),
    (SELECT p.quotas ->> 'kv_bytes' FROM quotas q JOIN plans p ON p.name = q.plan WHERE q.tenant_id = p_tenant)) AS amount) said
$$;

-- Put values where they belong, or take keys away (value NULL), if the quota has room; what makes a store smaller always
-- goes. The caller holds the tenant's row. The last of two values for one key counts. False: there is no room.
CREATE FUNCTION kv_apply(p_tenant uuid, p_task uuid, p_used bigint, p_default bigint, p_keys text[], p_values bytea[]) RETURNS boolean
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  more_keys bigint;
  more_bytes bigint;
BEGIN
  WITH wanted AS (SELECT DISTINCT ON (u.k) u.k, u.v FROM unnest(p_keys, p_values) WITH ORDINALITY u(k, v, o) ORDER BY u.k, u.o DESC)
  SELECT count(*) FILTER (WHERE w.v IS NOT NULL) - count(k.key),
      COALESCE(sum(octet_length(w.k) + octet_length(w.v) + 64), 0) - COALESCE(sum(octet_length(k.key) + octet_length(k.value) + 64), 0)
    INTO more_keys, more_bytes
    FROM wanted w LEFT JOIN kv k ON k.tenant_id = p_tenant AND k.task_id = p_task AND k.key = w.k;
  IF more_bytes > 0 AND p_used + more_bytes > kv_limit(p_tenant, p_default) THEN RETURN false; END IF;
  DELETE FROM kv k USING (SELECT DISTINCT ON (u.k) u.k, u.v FROM unnest(p_keys, p_values) WITH ORDINALITY u(k, v, o) ORDER BY u.k, u.o DESC) w
    WHERE k.tenant_id = p_tenant AND k.task_id = p_task AND k.key = w.k AND w.v IS NULL;
  INSERT INTO kv AS k (tenant_id, task_id, key, value, version)
    SELECT p_tenant, p_task, w.k, w.v, nextval('kv_versions')
    FROM (SELECT DISTINCT ON (u.k) u.k, u.v FROM unnest(p_keys, p_values) WITH ORDINALITY u(k, v, o) ORDER BY u.k, u.o DESC) w WHERE w.v IS NOT NULL
    ON CONFLICT (tenant_id, task_id, key) DO UPDATE
      SET value = EXCLUDED.value, version = EXCLUDED.version, updated_at = clock_timestamp();
  IF more_keys <> 0 OR more_bytes <> 0 THEN
    UPDATE kv_usage u SET keys = u.keys + more_keys, bytes = u.bytes + more_bytes WHERE u.tenant_id = p_tenant;
  END IF;
  RETURN true;
END $$;

-- Write pairs, all or none. outcome: 'ok', 'lost', 'denied', 'full'.
CREATE FUNCTION kv_put(a attempt_name, p_default bigint, p_keys text[], p_values bytea[]) RETURNS text
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE b record;
BEGIN
  SELECT * INTO b FROM kv_begin(a);
  IF b.outcome <> 'ok' THEN RETURN b.outcome; END IF;
  RETURN CASE WHEN kv_apply(a.tenant_id, b.task_id, b.bytes, p_default, p_keys, p_values) THEN 'ok' ELSE 'full' END;
END $$;

-- Write a value if the key's version is still this one; 0: if it is not there. Besides 'changed', with the version now.
CREATE FUNCTION kv_swap(a attempt_name, p_default bigint, p_key text, p_version bigint, p_value bytea, OUT outcome text, OUT version bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE b record;
BEGIN
  SELECT * INTO b FROM kv_begin(a);
  outcome := b.outcome;
  IF outcome <> 'ok' THEN RETURN; END IF;
  version := COALESCE((SELECT k.version FROM kv k WHERE k.tenant_id = a.tenant_id AND k.task_id = b.task_id AND k.key = p_key), 0);
  IF version <> p_version THEN outcome := 'changed'; RETURN; END IF;
  IF NOT kv_apply(a.tenant_id, b.task_id, b.bytes, p_default, ARRAY[p_key], ARRAY[p_value]) THEN outcome := 'full'; END IF;
END $$;

-- Add to a number in decimal digits. Besides 'nan' (what is there is none) and 'range' (the sum is none of 64 bits).
CREATE FUNCTION kv_increment(a attempt_name, p_default bigint, p_key text, p_delta bigint, OUT outcome text, OUT total bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  b record;
  old bytea;
  digits text;
  wide numeric;
BEGIN
  SELECT * INTO b FROM kv_begin(a);
  outcome := b.outcome;
  IF outcome <> 'ok' THEN RETURN; END IF;
  SELECT k.value INTO old FROM kv k WHERE k.tenant_id = a.tenant_id AND k.task_id = b.task_id AND k.key = p_key;
  -- encode(…, 'escape') reads any bytes; digits stay what they are.
  digits := CASE WHEN old IS NULL THEN '0' WHEN octet_length(old) <= 20 THEN encode(old, 'escape') ELSE '' END;
  IF digits !~ '^-?[0-9]{1,19}$' THEN outcome := 'nan'; RETURN; END IF;
  wide := digits::numeric + p_delta;
  IF wide NOT BETWEEN -9223372036854775808 AND 9223372036854775807 THEN outcome := 'range'; RETURN; END IF;
  total := wide::bigint;
  IF NOT kv_apply(a.tenant_id, b.task_id, b.bytes, p_default, ARRAY[p_key], ARRAY[convert_to(total::text, 'UTF8')]) THEN
    outcome := 'full'; total := NULL;
  END IF;
END $$;

-- Take the stores of this session's tenant away whose tasks are gone. Whoever writes there holds the tenant's row and has
-- looked whether the task is, so nothing comes after us.
CREATE FUNCTION kv_forget() RETURNS bigint
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
  gone_keys bigint;
  gone_bytes bigint;
BEGIN
  PERFORM 1 FROM kv_usage u WHERE u.tenant_id = t FOR UPDATE;
  IF NOT FOUND THEN RETURN 0; END IF;
  WITH gone AS (DELETE FROM kv k USING tasks x WHERE k.tenant_id = t AND x.tenant_id = t AND x.task_id = k.task_id AND x.deleted_at IS NOT NULL
    RETURNING octet_length(k.key) + octet_length(k.value) + 64 AS bytes)
  SELECT count(*), COALESCE(sum(g.bytes), 0) INTO gone_keys, gone_bytes FROM gone g;
  UPDATE kv_usage u SET keys = u.keys - gone_keys, bytes = u.bytes - gone_bytes WHERE u.tenant_id = t AND gone_keys > 0;
  RETURN gone_keys;
END $$;

REVOKE EXECUTE ON FUNCTION attempt_task, kv_read, kv_list, kv_begin, kv_limit, kv_apply, kv_put, kv_swap, kv_increment, kv_forget FROM PUBLIC;
GRANT EXECUTE ON FUNCTION attempt_task, kv_read, kv_list, kv_begin, kv_limit, kv_apply, kv_put, kv_swap, kv_increment TO sandbar_worker;
GRANT EXECUTE ON FUNCTION kv_forget TO sandbar_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON kv, kv_usage TO sandbar_worker;
GRANT USAGE ON SEQUENCE kv_versions TO sandbar_worker;
GRANT SELECT, DELETE ON kv TO sandbar_api;
GRANT SELECT, UPDATE ON kv_usage TO sandbar_api;
