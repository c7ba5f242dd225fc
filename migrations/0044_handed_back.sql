-- An attempt that a host only handed back (no key, no cell, no memory left for it) is no fault that counts: an invocation
-- that met a crowd or a mistake in somebody's configuration many times is not to die of the first crash of a host after it.
-- Such attempts have `handed_back` in their termination, and are counted out only where the plain difference of the
-- numbers is too large.

-- Attempts of an invocation that ended by the fault of a host.
CREATE FUNCTION host_faults(p_tenant uuid, p_invocation uuid) RETURNS int
LANGUAGE sql STABLE SET search_path = sandbar, pg_temp AS $$
  SELECT count(*)::int FROM attempts a
  WHERE a.tenant_id = p_tenant AND a.invocation_id = p_invocation
    AND a.termination ->> 'reason' IN ('host-fault', 'lease-lost') AND NOT a.termination ? 'handed_back'
$$;

DO $$
DECLARE
  was constant text := 'WHEN o.attempt - o.spent > p_max_handovers THEN ''dead'' END';
  -- The row of the attempt that is lost here is not visible to the statement that inserts it.
  becomes constant text := 'WHEN o.attempt - o.spent > p_max_handovers AND host_faults(o.tenant_id, o.invocation_id) >= p_max_handovers THEN ''dead'' END';
  body text := pg_get_functiondef('reap'::regproc);
BEGIN
  IF position(was IN body) = 0 THEN
    RAISE EXCEPTION 'reap is not as 0008 made it';
  END IF;
  EXECUTE replace(body, was, becomes);
END $$;

REVOKE EXECUTE ON FUNCTION host_faults FROM PUBLIC;
GRANT EXECUTE ON FUNCTION host_faults TO sandbar_worker;
