-- Compilations are taken by tenants in turn, so many of one tenant at once and so many waiting.

-- When a compilation of the tenant's last began: whose is longest ago is next.
ALTER TABLE tenants ADD COLUMN compiled_at timestamptz;
GRANT UPDATE (compiled_at) ON tenants TO sandbar_worker;

-- How many uploads of this session's tenant, and of all, wait for their compilation or are being compiled. Nobody waits for
-- those of deleted tasks.
CREATE FUNCTION compilations_waiting(OUT own bigint, OUT in_all bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT count(*) FILTER (WHERE v.tenant_id = current_tenant()), count(*)
  FROM versions v JOIN tasks t ON t.tenant_id = v.tenant_id AND t.task_id = v.task_id
  WHERE v.state = 'compiling' AND t.deleted_at IS NULL
$$;
REVOKE EXECUTE ON FUNCTION compilations_waiting FROM PUBLIC;
GRANT EXECUTE ON FUNCTION compilations_waiting TO sandbar_api;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION compilations_waiting OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;

-- As before (0002); and what was never compiled never will be, or it would stay in the index of what waits for ever.
CREATE OR REPLACE FUNCTION free_modules(p_after interval, p_limit int) RETURNS bigint
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
    UPDATE versions v SET state = 'rejected',
        rejection = '{"code": "does-not-compile", "detail": "the task was deleted before this was compiled"}'
      WHERE v.tenant_id = k.tenant_id AND v.task_id = k.task_id AND v.state = 'compiling';
    UPDATE tasks x SET freed_at = clock_timestamp() WHERE x.tenant_id = k.tenant_id AND x.task_id = k.task_id;
  END LOOP;
  RETURN n;
END $$;
