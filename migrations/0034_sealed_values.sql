-- What 0026 left in the clear may be sealed too: values of key-value stores, configuration of tasks, inputs of starts. The
-- program seals and opens (src/app/sealed/task.rs); Postgres only keeps what it is given.
--
-- Unlike an invocation these have no one moment at which they are accepted, so each value says for itself whether it is
-- sealed and by which data key. In `tasks.config` a plain value is a text, a sealed one {"sealed": key, "data": base64}.
ALTER TABLE kv ADD COLUMN sealed text CHECK (sealed ~ '^[0-9a-f]{16}$');
ALTER TABLE starts ADD COLUMN sealed text CHECK (sealed ~ '^[0-9a-f]{16}$');

-- Read values of a store, as kv_read, with what seals them.
CREATE FUNCTION kv_values(a attempt_name, p_keys text[], p_values boolean, p_max_bytes bigint)
RETURNS TABLE (outcome text, key text, value bytea, version bigint, sealed text)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE h record;
BEGIN
  SELECT * INTO h FROM attempt_task(a, false);
  IF NOT FOUND THEN RETURN QUERY SELECT 'lost', NULL::text, NULL::bytea, NULL::bigint, NULL::text; RETURN; END IF;
  IF (h.grants ->> 'kv') IS DISTINCT FROM 'true' THEN
    RETURN QUERY SELECT 'denied', NULL::text, NULL::bytea, NULL::bigint, NULL::text; RETURN;
  END IF;
  IF p_values AND (SELECT sum(octet_length(k.value)) FROM kv k
      WHERE k.tenant_id = a.tenant_id AND k.task_id = h.task_id AND k.key = ANY (p_keys)) > p_max_bytes THEN
    RETURN QUERY SELECT 'large', NULL::text, NULL::bytea, NULL::bigint, NULL::text; RETURN;
  END IF;
  RETURN QUERY SELECT 'ok', NULL::text, NULL::bytea, NULL::bigint, NULL::text
    UNION ALL SELECT 'ok', k.key, CASE WHEN p_values THEN k.value END, k.version, k.sealed FROM kv k
      WHERE k.tenant_id = a.tenant_id AND k.task_id = h.task_id AND k.key = ANY (p_keys);
END $$;

-- A worker of an earlier version must not hand a ciphertext to a guest.
CREATE OR REPLACE FUNCTION kv_read(a attempt_name, p_keys text[], p_values boolean, p_max_bytes bigint)
RETURNS TABLE (outcome text, key text, value bytea, version bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
BEGIN
  IF p_values AND EXISTS (SELECT 1 FROM kv_values(a, p_keys, false, 0) v WHERE v.sealed IS NOT NULL) THEN
    RAISE EXCEPTION 'a value is sealed: only a newer worker reads it';
  END IF;
  RETURN QUERY SELECT v.outcome, v.key, v.value, v.version FROM kv_values(a, p_keys, p_values, p_max_bytes) v;
END $$;

-- As before, with what seals the values (NULL: nothing does).
CREATE FUNCTION kv_apply(p_tenant uuid, p_task uuid, p_used bigint, p_default bigint, p_keys text[], p_values bytea[], p_sealed text)
RETURNS boolean
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
  INSERT INTO kv AS k (tenant_id, task_id, key, value, version, sealed)
    SELECT p_tenant, p_task, w.k, w.v, nextval('kv_versions'), p_sealed
    FROM (SELECT DISTINCT ON (u.k) u.k, u.v FROM unnest(p_keys, p_values) WITH ORDINALITY u(k, v, o) ORDER BY u.k, u.o DESC) w WHERE w.v IS NOT NULL
    ON CONFLICT (tenant_id, task_id, key) DO UPDATE
      SET value = EXCLUDED.value, version = EXCLUDED.version, sealed = EXCLUDED.sealed, updated_at = clock_timestamp();
  IF more_keys <> 0 OR more_bytes <> 0 THEN
    UPDATE kv_usage u SET keys = u.keys + more_keys, bytes = u.bytes + more_bytes WHERE u.tenant_id = p_tenant;
  END IF;
  RETURN true;
END $$;

-- What functions before this one and workers of an earlier version write is plain, also over what was sealed.
CREATE OR REPLACE FUNCTION kv_apply(p_tenant uuid, p_task uuid, p_used bigint, p_default bigint, p_keys text[], p_values bytea[]) RETURNS boolean
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  SELECT kv_apply(p_tenant, p_task, p_used, p_default, p_keys, p_values, NULL)
$$;

CREATE FUNCTION kv_put(a attempt_name, p_default bigint, p_keys text[], p_values bytea[], p_sealed text) RETURNS text
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
DECLARE b record;
BEGIN
  SELECT * INTO b FROM kv_begin(a);
  IF b.outcome <> 'ok' THEN RETURN b.outcome; END IF;
  RETURN CASE WHEN kv_apply(a.tenant_id, b.task_id, b.bytes, p_default, p_keys, p_values, p_sealed) THEN 'ok' ELSE 'full' END;
END $$;

CREATE FUNCTION kv_swap(a attempt_name, p_default bigint, p_key text, p_version bigint, p_value bytea, p_sealed text,
  OUT outcome text, OUT version bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE b record;
BEGIN
  SELECT * INTO b FROM kv_begin(a);
  outcome := b.outcome;
  IF outcome <> 'ok' THEN RETURN; END IF;
  version := COALESCE((SELECT k.version FROM kv k WHERE k.tenant_id = a.tenant_id AND k.task_id = b.task_id AND k.key = p_key), 0);
  IF version <> p_version THEN outcome := 'changed'; RETURN; END IF;
  IF NOT kv_apply(a.tenant_id, b.task_id, b.bytes, p_default, ARRAY[p_key], ARRAY[p_value], p_sealed) THEN outcome := 'full'; END IF;
END $$;

-- As before; besides 'sealed': the worker has to open what is there, and to add by itself.
CREATE OR REPLACE FUNCTION kv_increment(a attempt_name, p_default bigint, p_key text, p_delta bigint, OUT outcome text, OUT total bigint)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  b record;
  old record;
  digits text;
  wide numeric;
BEGIN
  SELECT * INTO b FROM kv_begin(a);
  outcome := b.outcome;
  IF outcome <> 'ok' THEN RETURN; END IF;
  SELECT k.value, k.sealed INTO old FROM kv k WHERE k.tenant_id = a.tenant_id AND k.task_id = b.task_id AND k.key = p_key;
  IF old.sealed IS NOT NULL THEN outcome := 'sealed'; RETURN; END IF;
  -- encode(…, 'escape') reads any bytes; digits stay what they are.
  digits := CASE WHEN old.value IS NULL THEN '0' WHEN octet_length(old.value) <= 20 THEN encode(old.value, 'escape') ELSE '' END;
  IF digits !~ '^-?[0-9]{1,19}$' THEN outcome := 'nan'; RETURN; END IF;
  wide := digits::numeric + p_delta;
  IF wide NOT BETWEEN -9223372036854775808 AND 9223372036854775807 THEN outcome := 'range'; RETURN; END IF;
  total := wide::bigint;
  IF NOT kv_apply(a.tenant_id, b.task_id, b.bytes, p_default, ARRAY[p_key], ARRAY[convert_to(total::text, 'UTF8')]) THEN
    outcome := 'full'; total := NULL;
  END IF;
END $$;

-- Ask for an invocation, as before, with an input that may be sealed. p_hashes: digests of the plain input, the one that is
-- kept first; a request is the same if any of them is the one that was kept.
CREATE FUNCTION start_ask(a attempt_name, p_start uuid, p_root uuid, p_depth smallint, p_task text, p_input bytea, p_sealed text,
  p_hashes bytea[], p_key text, p_children int, p_family int, OUT outcome text, OUT start_id uuid)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  h record;
  old record;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended(p_root::text, 7260022));
  SELECT * INTO h FROM attempt_task(a, true);
  IF NOT FOUND THEN outcome := 'lost'; RETURN; END IF;
  IF NOT COALESCE(h.grants -> 'invoke' ? p_task, false) THEN outcome := 'denied'; RETURN; END IF;
  SELECT s.start_id, s.task, s.input_hash, s.refused INTO old FROM starts s
    WHERE s.tenant_id = a.tenant_id AND s.parent_id = a.invocation_id AND s.key = p_key;
  IF FOUND THEN
    IF old.task <> p_task OR old.input_hash <> ALL (p_hashes) THEN outcome := 'conflict'; RETURN; END IF;
    IF old.refused IS NOT NULL THEN
      UPDATE starts s SET refused = NULL, taken_until = NULL, input = p_input, sealed = p_sealed, input_hash = p_hashes[1]
        WHERE s.tenant_id = a.tenant_id AND s.start_id = old.start_id;
    END IF;
    outcome := 'ok'; start_id := old.start_id; RETURN;
  END IF;
  IF (SELECT count(*) FROM starts s WHERE s.tenant_id = a.tenant_id AND s.parent_id = a.invocation_id) >= p_children THEN
    outcome := 'children'; RETURN;
  END IF;
  IF (SELECT count(*) FROM starts s WHERE s.tenant_id = a.tenant_id AND s.root_id = p_root) >= p_family THEN
    outcome := 'family'; RETURN;
  END IF;
  INSERT INTO starts (tenant_id, start_id, parent_id, root_id, depth, key, task, input, sealed, input_hash)
    VALUES (a.tenant_id, p_start, a.invocation_id, p_root, p_depth, p_key, p_task, p_input, p_sealed, p_hashes[1]);
  outcome := 'ok'; start_id := p_start;
END $$;

-- A data key for a tenant that has none, made by a worker whose guest is the first to leave something that must be sealed.
-- Of a tenant that is not active nothing is made: its key may have been erased this moment.
CREATE FUNCTION tenant_key_make(p_tenant uuid, p_master text, p_wrapped bytea, OUT master text, OUT wrapped bytea)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
BEGIN
  PERFORM 1 FROM tenants t WHERE t.tenant_id = p_tenant AND t.state = 'active';
  IF FOUND THEN
    INSERT INTO tenant_keys (tenant_id, master, wrapped) VALUES (p_tenant, p_master, p_wrapped) ON CONFLICT DO NOTHING;
  END IF;
  SELECT k.master, k.wrapped INTO master, wrapped FROM tenant_keys k WHERE k.tenant_id = p_tenant;
END $$;

GRANT INSERT ON tenant_keys TO sandbar_worker;
DO $$
DECLARE f regprocedure;
BEGIN
  FOREACH f IN ARRAY ARRAY['kv_values(attempt_name,text[],boolean,bigint)',
      'kv_apply(uuid,uuid,bigint,bigint,text[],bytea[],text)', 'kv_put(attempt_name,bigint,text[],bytea[],text)',
      'kv_swap(attempt_name,bigint,text,bigint,bytea,text)',
      'start_ask(attempt_name,uuid,uuid,smallint,text,bytea,text,bytea[],text,integer,integer)',
      'tenant_key_make(uuid,text,bytea)']::regprocedure[] LOOP
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO sandbar_worker', f);
  END LOOP;
END $$;
