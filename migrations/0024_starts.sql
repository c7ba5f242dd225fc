-- Invocations that running attempts start. An attempt asks here, fenced by its lease; a server makes an invocation of it as
-- it does of any request, and writes down what came of it. `start_id` is the idempotency key of that request, so a server
-- that dies between the two leaves nothing twice.
--
-- A family is everything that goes back to one invocation that nobody started: its number of starts is bounded, under a
-- lock of the family.
CREATE TABLE starts (
  tenant_id   uuid NOT NULL REFERENCES tenants,
  start_id    uuid NOT NULL,
  parent_id   uuid NOT NULL,           -- the invocation that asks
  root_id     uuid NOT NULL,           -- the family
  depth       smallint NOT NULL,       -- of what is started
  key         text CHECK (octet_length(key) BETWEEN 1 AND 128), -- the guest's, so that another attempt starts it once
  task        text NOT NULL,
  input       bytea NOT NULL,          -- empty when it is settled
  input_hash  bytea NOT NULL,
  asked_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
  taken_until timestamptz,             -- somebody sees to it until then
  invocation_id uuid,                  -- what came of it
  refused     text,                    -- or why nothing did
  PRIMARY KEY (tenant_id, start_id)
);
CREATE UNIQUE INDEX starts_key ON starts (tenant_id, parent_id, key) WHERE key IS NOT NULL;
CREATE INDEX starts_parent ON starts (tenant_id, parent_id);
CREATE INDEX starts_root ON starts (tenant_id, root_id);
CREATE INDEX starts_open ON starts (asked_at) WHERE invocation_id IS NULL AND refused IS NULL;
CREATE INDEX starts_old ON starts (asked_at);

ALTER TABLE starts ENABLE ROW LEVEL SECURITY;
ALTER TABLE starts FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON starts TO sandbar_api USING (tenant_id = (SELECT current_tenant())) WITH CHECK (tenant_id = (SELECT current_tenant()));
CREATE POLICY worker ON starts TO sandbar_worker USING (true) WITH CHECK (true);
DO $$ BEGIN EXECUTE 'CREATE POLICY owner ON starts TO CURRENT_USER USING (true) WITH CHECK (true)'; END $$;
GRANT SELECT ON starts TO sandbar_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON starts TO sandbar_worker;

-- Ask for an invocation. outcome: 'ok', 'lost', 'denied', 'conflict' (the key was used for something else), 'children' or
-- 'family' (as many as there may be). One that was refused before is asked for anew by the same key.
CREATE FUNCTION start_ask(a attempt_name, p_start uuid, p_root uuid, p_depth smallint, p_task text, p_input bytea, p_key text,
  p_children int, p_family int, OUT outcome text, OUT start_id uuid)
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
    IF old.task <> p_task OR old.input_hash <> sha256(p_input) THEN outcome := 'conflict'; RETURN; END IF;
    IF old.refused IS NOT NULL THEN
      UPDATE starts s SET refused = NULL, taken_until = NULL, input = p_input WHERE s.tenant_id = a.tenant_id AND s.start_id = old.start_id;
    END IF;
    outcome := 'ok'; start_id := old.start_id; RETURN;
  END IF;
  IF (SELECT count(*) FROM starts s WHERE s.tenant_id = a.tenant_id AND s.parent_id = a.invocation_id) >= p_children THEN
    outcome := 'children'; RETURN;
  END IF;
  IF (SELECT count(*) FROM starts s WHERE s.tenant_id = a.tenant_id AND s.root_id = p_root) >= p_family THEN
    outcome := 'family'; RETURN;
  END IF;
  INSERT INTO starts (tenant_id, start_id, parent_id, root_id, depth, key, task, input, input_hash)
    VALUES (a.tenant_id, p_start, a.invocation_id, p_root, p_depth, p_key, p_task, p_input, sha256(p_input));
  outcome := 'ok'; start_id := p_start;
END $$;
REVOKE EXECUTE ON FUNCTION start_ask FROM PUBLIC;
GRANT EXECUTE ON FUNCTION start_ask TO sandbar_worker;
