-- The audit log: every change and every denied attempt, who and from where. Append-only: rows are never changed, and go
-- only when they are older than the retention, or with their tenant.

CREATE TABLE audit (
  tenant_id  uuid NOT NULL,            -- no foreign key: nil is the installation itself, and whoever had no credential
  audit_id   uuid NOT NULL,            -- version 7
  at         timestamptz NOT NULL,
  actor_kind text NOT NULL CHECK (actor_kind IN ('key', 'user', 'subject', 'nobody')),
  actor_id   uuid,
  actor      text NOT NULL,            -- its name then
  address    text,
  request_id text,
  operation  text NOT NULL,            -- 'PATCH /v1/tasks/{task}'
  action     text,                     -- as domain::permission names it
  target     text NOT NULL,            -- the path as called
  outcome    text NOT NULL CHECK (outcome IN ('done', 'denied')),
  status     smallint NOT NULL,
  code       text,                     -- of the problem
  times      int NOT NULL CHECK (times > 0), -- equal denials within a second are one row
  before     jsonb,
  after      jsonb,
  PRIMARY KEY (tenant_id, audit_id)
);
CREATE INDEX audit_by_actor ON audit (tenant_id, actor_id, audit_id);
CREATE INDEX audit_by_age ON audit (at);

ALTER TABLE audit ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON audit TO sandbar_api USING (tenant_id = (SELECT current_tenant()))
  WITH CHECK (tenant_id = (SELECT current_tenant()));
CREATE POLICY definer ON audit TO sandbar_definer USING (true) WITH CHECK (true);
CREATE POLICY owner ON audit TO CURRENT_USER USING (true) WITH CHECK (true);

-- Not even the functions below can do what must not be done.
CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF TG_OP = 'DELETE' AND (OLD.at < clock_timestamp() - interval '400 days'
    OR (OLD.tenant_id <> '00000000-0000-0000-0000-000000000000'
        AND NOT EXISTS (SELECT 1 FROM tenants t WHERE t.tenant_id = OLD.tenant_id))) THEN
    RETURN OLD;
  END IF;
  RAISE EXCEPTION 'the audit log is append-only' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE ON audit
  FOR EACH ROW EXECUTE FUNCTION audit_is_append_only();
CREATE TRIGGER audit_is_never_emptied BEFORE TRUNCATE ON audit
  FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only();

-- Entries of many tenants in one statement, hence SECURITY DEFINER: the tenant comes from the entry.
CREATE FUNCTION audit_write(p_entries jsonb) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  INSERT INTO audit (tenant_id, audit_id, at, actor_kind, actor_id, actor, address, request_id, operation, action, target,
    outcome, status, code, times, before, after)
  SELECT e.tenant_id, e.audit_id, e.at, e.actor_kind, e.actor_id, e.actor, e.address, e.request_id, e.operation, e.action,
    e.target, e.outcome, e.status, e.code, e.times, e.before, e.after
  FROM jsonb_to_recordset(p_entries) AS e(tenant_id uuid, audit_id uuid, at timestamptz, actor_kind text, actor_id uuid,
    actor text, address text, request_id text, operation text, action text, target text, outcome text, status smallint,
    code text, times int, before jsonb, after jsonb)
  ON CONFLICT DO NOTHING
$$;

-- Forget what is older than the retention, at most p_limit rows. Returns how many.
CREATE FUNCTION audit_forget(p_limit bigint) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  WITH old AS (
    SELECT a.tenant_id, a.audit_id FROM audit a WHERE a.at < clock_timestamp() - interval '400 days' ORDER BY a.at LIMIT p_limit
  ), gone AS (
    DELETE FROM audit a USING old o WHERE a.tenant_id = o.tenant_id AND a.audit_id = o.audit_id RETURNING 1
  )
  SELECT count(*) FROM gone
$$;

REVOKE EXECUTE ON FUNCTION audit_is_append_only, audit_write, audit_forget FROM PUBLIC;
GRANT SELECT ON audit TO sandbar_api;
GRANT SELECT, INSERT, DELETE ON audit TO sandbar_definer;
GRANT EXECUTE ON FUNCTION audit_write TO sandbar_api;
GRANT EXECUTE ON FUNCTION audit_forget TO sandbar_worker;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION audit_write OWNER TO sandbar_definer;
ALTER FUNCTION audit_forget OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
