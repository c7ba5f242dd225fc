-- Room for more attempts in a worker's memory, as its last heartbeat said: why a queue waits while slots are free.
ALTER TABLE workers ADD COLUMN room int; -- NULL: it has not said yet

DROP FUNCTION fleet;
-- As 0004 made it, and the room of those that claim; NULL when one of them has not said.
CREATE FUNCTION fleet() RETURNS TABLE (workers bigint, claiming bigint, slots bigint, running bigint, room bigint, share double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT count(*), count(*) FILTER (WHERE w.wanted = 'active'),
    COALESCE(sum(w.slots) FILTER (WHERE w.wanted = 'active'), 0), COALESCE(sum(w.running) FILTER (WHERE w.wanted = 'active'), 0),
    CASE WHEN count(*) FILTER (WHERE w.wanted = 'active' AND w.room IS NULL) = 0 THEN sum(w.room) FILTER (WHERE w.wanted = 'active') END,
    (SELECT COALESCE(max(m.weight)::double precision / NULLIF(COALESCE(sum(r.weight) FILTER (WHERE r.tenant_id <> m.tenant_id), 0) + max(m.weight), 0), 1)
     FROM tenants m LEFT JOIN ready_tenants(1000) r ON true WHERE m.tenant_id = current_tenant())
  FROM workers w
$$;
REVOKE EXECUTE ON FUNCTION fleet FROM PUBLIC;
GRANT EXECUTE ON FUNCTION fleet TO sandbar_api;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION fleet OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
