-- Payloads sealed at rest. The program seals and opens (src/app/sealed.rs); Postgres only keeps what it is given.
--
-- What tells sealed from plain is in the invocation, for good: `spec ->> 'sealed'` names the data key that seals all of
-- its payloads (input, arguments, output, artifacts, log, progress, messages, backtrace). Without it they are plain. So
-- both kinds stand side by side, and no function of the queue knows of it.

-- Whether a tenant wants its payloads sealed; the installation may want it of all.
ALTER TABLE tenants ADD COLUMN seal_payloads boolean NOT NULL DEFAULT false;
GRANT UPDATE (seal_payloads) ON tenants TO sandbar_api;

-- When the payloads of an invocation were erased.
ALTER TABLE invocations ADD COLUMN erased_at timestamptz;

-- Erase the payloads of one invocation of this session's tenant that has ended: 'erased', 'open' or 'unknown'. What
-- remains is what happened: states, times, tags, receipts, reasons, the kind of failure.
CREATE FUNCTION erase_payloads(p_invocation uuid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
BEGIN
  PERFORM 1 FROM invocations i WHERE i.tenant_id = t AND i.invocation_id = p_invocation FOR NO KEY UPDATE;
  IF NOT FOUND THEN RETURN 'unknown'; END IF;
  IF NOT EXISTS (SELECT 1 FROM results r WHERE r.tenant_id = t AND r.invocation_id = p_invocation) THEN
    RETURN 'open';
  END IF;
  UPDATE invocations i SET input = '', erased_at = COALESCE(i.erased_at, clock_timestamp()),
      spec = (CASE i.spec #>> '{input,kind}' WHEN 'command'
        THEN jsonb_set(i.spec, '{input}', '{"kind": "command", "args": [], "env": {}}') ELSE i.spec END) - 'scratch'
    WHERE i.tenant_id = t AND i.invocation_id = p_invocation;
  UPDATE results r SET output = NULL, content_type = NULL WHERE r.tenant_id = t AND r.invocation_id = p_invocation;
  UPDATE attempts a SET backtrace = NULL,
      termination = CASE WHEN a.termination ? 'message' THEN jsonb_set(a.termination, '{message}', '""') ELSE a.termination END
    WHERE a.tenant_id = t AND a.invocation_id = p_invocation;
  DELETE FROM logs l WHERE l.tenant_id = t AND l.invocation_id = p_invocation;
  DELETE FROM live_logs l WHERE l.tenant_id = t AND l.invocation_id = p_invocation;
  DELETE FROM progress p WHERE p.tenant_id = t AND p.invocation_id = p_invocation;
  DELETE FROM artifacts a WHERE a.tenant_id = t AND a.invocation_id = p_invocation;
  UPDATE dead_letters d SET summary = NULL WHERE d.tenant_id = t AND d.invocation_id = p_invocation;
  -- The digest of a request lets whoever guesses its body know that he did.
  DELETE FROM idempotency_keys k WHERE k.tenant_id = t AND k.invocation_id = p_invocation;
  RETURN 'erased';
END $$;

-- The last report of progress may be written a moment after the end, and so after the erasure.
CREATE FUNCTION not_when_erased() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM invocations i
    WHERE i.tenant_id = NEW.tenant_id AND i.invocation_id = NEW.invocation_id AND i.erased_at IS NOT NULL) THEN
    RETURN NULL;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER not_when_erased BEFORE INSERT OR UPDATE ON progress FOR EACH ROW EXECUTE FUNCTION not_when_erased();

-- Erase the data key of a tenant that is not active, and its secrets, which nothing opens any more: 'erased', 'active' or
-- 'unknown'. For the platform, whose own tenant this is not, hence SECURITY DEFINER.
CREATE FUNCTION erase_tenant_key(p_tenant uuid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  s text;
BEGIN
  SELECT x.state INTO s FROM tenants x
    WHERE x.tenant_id = p_tenant AND (x.delete_after IS NULL OR x.delete_after > clock_timestamp()) FOR NO KEY UPDATE;
  IF NOT FOUND THEN RETURN 'unknown'; END IF;
  IF s = 'active' THEN RETURN 'active'; END IF;
  DELETE FROM secret_versions v WHERE v.tenant_id = p_tenant;
  DELETE FROM secrets v WHERE v.tenant_id = p_tenant;
  DELETE FROM tenant_keys k WHERE k.tenant_id = p_tenant;
  RETURN 'erased';
END $$;

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['tenant_keys', 'secrets', 'secret_versions'] LOOP
    EXECUTE format('CREATE POLICY definer ON %I TO sandbar_definer USING (true) WITH CHECK (true)', t);
    EXECUTE format('GRANT SELECT, DELETE ON %I TO sandbar_definer', t);
  END LOOP;
END $$;

REVOKE EXECUTE ON FUNCTION erase_payloads, not_when_erased, erase_tenant_key FROM PUBLIC;
GRANT EXECUTE ON FUNCTION erase_payloads, erase_tenant_key TO sandbar_api;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION erase_payloads OWNER TO sandbar_definer;
ALTER FUNCTION not_when_erased OWNER TO sandbar_definer;
ALTER FUNCTION erase_tenant_key OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
GRANT SELECT ON idempotency_keys TO sandbar_api; -- the digest of a request is another when it is sealed
GRANT SELECT, DELETE ON artifacts TO sandbar_definer;
GRANT UPDATE (input, spec, erased_at) ON invocations TO sandbar_definer;
GRANT UPDATE (output, content_type) ON results TO sandbar_definer;
GRANT UPDATE (termination, backtrace) ON attempts TO sandbar_definer;
GRANT UPDATE (summary) ON dead_letters TO sandbar_definer;
