-- What is due is found by its index. clock_timestamp() is volatile, so an index is never asked about it: each of these went over
-- everything that waits, however little of it was due. A subquery is asked once, and ORDER BY says which index.

-- Move what is due from `scheduled` to `ready`, at most p_limit; cancelled ones end here.
CREATE OR REPLACE FUNCTION promote(p_limit int) RETURNS bigint
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  n bigint;
  e_t uuid[]; e_i uuid[]; e_f smallint[];
BEGIN
  WITH due AS (
    SELECT tenant_id, invocation_id FROM scheduled WHERE due_at <= (SELECT clock_timestamp())
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
CREATE OR REPLACE FUNCTION expire(p_limit int) RETURNS TABLE (tenant_id uuid, invocation_id uuid)
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  e_t uuid[]; e_i uuid[];
BEGIN
  WITH due AS MATERIALIZED (
    SELECT e.tenant_id, e.invocation_id, rank_of(i.created_at, i.run_at, i.priority) AS rank
    FROM expiring e JOIN invocations i USING (tenant_id, invocation_id)
    WHERE e.expires_at <= (SELECT clock_timestamp())
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

-- Forget what is older than the retention, at most p_limit rows. Returns how many.
CREATE OR REPLACE FUNCTION audit_forget(p_limit bigint) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  WITH old AS (
    SELECT a.tenant_id, a.audit_id FROM audit a WHERE a.at < (SELECT clock_timestamp()) - interval '400 days' ORDER BY a.at LIMIT p_limit
  ), gone AS (
    DELETE FROM audit a USING old o WHERE a.tenant_id = o.tenant_id AND a.audit_id = o.audit_id RETURNING 1
  )
  SELECT count(*) FROM gone
$$;

-- Forget what is over: sessions, failed logins, invitations. Returns how many.
CREATE OR REPLACE FUNCTION people_tidy(p_limit bigint) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  WITH s AS (DELETE FROM sessions WHERE session_id IN
    (SELECT session_id FROM sessions WHERE expires_at < (SELECT clock_timestamp()) ORDER BY expires_at LIMIT p_limit) RETURNING 1),
  f AS (DELETE FROM login_failures WHERE email_hash IN (SELECT email_hash FROM login_failures
    WHERE last_at < (SELECT clock_timestamp()) - interval '1 day' ORDER BY last_at LIMIT p_limit) RETURNING 1)
  SELECT (SELECT count(*) FROM s) + (SELECT count(*) FROM f)
$$;

-- Forget what nobody needs any more, at most p_limit of each: idempotency keys past their time, cancellations of what has ended,
-- workers gone for a day, caps of keys that nothing runs under (a claim that meets the key makes its row again), starts and
-- notes of late acks after a month. Returns how many.
CREATE FUNCTION tidy(p_limit bigint) RETURNS bigint
LANGUAGE sql SET search_path = sandbar, pg_temp AS $$
  WITH a AS (
    DELETE FROM idempotency_keys k USING (SELECT tenant_id, key FROM idempotency_keys WHERE expires_at <= (SELECT clock_timestamp())
        ORDER BY expires_at LIMIT p_limit) old
      WHERE k.tenant_id = old.tenant_id AND k.key = old.key AND k.expires_at <= (SELECT clock_timestamp()) RETURNING 1
  ), b AS (
    DELETE FROM cancels c USING (SELECT c.tenant_id, c.invocation_id FROM cancels c JOIN results r USING (tenant_id, invocation_id)
        LIMIT p_limit) old
      WHERE c.tenant_id = old.tenant_id AND c.invocation_id = old.invocation_id RETURNING 1
  ), c AS (
    DELETE FROM workers_gone g USING (SELECT worker_id FROM workers_gone WHERE gone_at < (SELECT clock_timestamp()) - interval '1 day'
        ORDER BY gone_at LIMIT p_limit) old
      WHERE g.worker_id = old.worker_id RETURNING 1
  ), d AS (
    DELETE FROM caps c USING (SELECT tenant_id, task_id, key FROM caps WHERE scope = 2 AND running = 0 LIMIT p_limit
        FOR UPDATE SKIP LOCKED) old
      WHERE c.tenant_id = old.tenant_id AND c.scope = 2 AND c.task_id = old.task_id AND c.key = old.key RETURNING 1
  ), e AS (
    DELETE FROM starts s USING (SELECT tenant_id, start_id FROM starts WHERE asked_at < (SELECT clock_timestamp()) - interval '30 days'
        ORDER BY asked_at LIMIT p_limit) old
      WHERE s.tenant_id = old.tenant_id AND s.start_id = old.start_id RETURNING 1
  ), f AS (
    DELETE FROM late_acks l USING (SELECT ctid FROM late_acks WHERE at < (SELECT clock_timestamp()) - interval '30 days'
        ORDER BY at LIMIT p_limit) old
      WHERE l.ctid = old.ctid RETURNING 1
  )
  SELECT (SELECT count(*) FROM a) + (SELECT count(*) FROM b) + (SELECT count(*) FROM c) + (SELECT count(*) FROM d)
    + (SELECT count(*) FROM e) + (SELECT count(*) FROM f)
$$;
REVOKE EXECUTE ON FUNCTION tidy FROM PUBLIC;
GRANT EXECUTE ON FUNCTION tidy TO sandbar_worker;
