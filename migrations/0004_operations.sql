-- Operations: what workers say of themselves and what is wanted of them, duties with fences and settings, the
-- platform's own role, dead letters, bulk operations, and how much of a tenant may wait.

-- ---------------------------------------------------------------- who

-- 'platform' may all that 'admin' may in its own tenant, and operates the installation (domain::role has the table).
ALTER TABLE api_keys DROP CONSTRAINT api_keys_role_check;
ALTER TABLE api_keys ADD CONSTRAINT api_keys_role_check CHECK (role IN ('admin', 'platform'));

-- Invocations of a tenant that may wait at once; NULL: the installation's default.
ALTER TABLE tenants ADD COLUMN max_queued bigint CHECK (max_queued BETWEEN 0 AND 1000000000);

-- ---------------------------------------------------------------- workers

-- What a heartbeat carries up, and what it brings down (wanted). A heartbeat changes no indexed column, and half of
-- each page is left free, so its new row version stays on its page and in no index.
ALTER TABLE workers
  ADD COLUMN wanted text NOT NULL DEFAULT 'active' CHECK (wanted IN ('active', 'cordoned', 'draining')),
  ADD COLUMN running int NOT NULL DEFAULT 0,
  ADD COLUMN worker_bytes bigint,
  ADD COLUMN cells_bytes bigint,
  ADD COLUMN host_bytes bigint;
ALTER TABLE workers SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_cost_delay = 0);

-- Workers that left or were declared dead, for a day.
CREATE TABLE workers_gone (
  worker_id    uuid PRIMARY KEY,
  host         text NOT NULL,
  version      text NOT NULL,
  slots        int NOT NULL,
  started_at   timestamptz NOT NULL,
  heartbeat_at timestamptz NOT NULL,
  gone_at      timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX workers_gone_at ON workers_gone (gone_at);

-- A trigger, because leaving and being reaped are the same DELETE in the queue's protocol.
CREATE FUNCTION worker_gone() RETURNS trigger LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
BEGIN
  INSERT INTO workers_gone (worker_id, host, version, slots, started_at, heartbeat_at)
    VALUES (OLD.worker_id, OLD.host, OLD.version, OLD.slots, OLD.started_at, OLD.heartbeat_at)
    ON CONFLICT DO NOTHING;
  RETURN NULL;
END $$;
CREATE TRIGGER workers_gone AFTER DELETE ON workers FOR EACH ROW EXECUTE FUNCTION worker_gone();

-- ---------------------------------------------------------------- duties

-- fence grows whenever the lease changes hands. A run's transactions begin with duty_check, which holds the row by a
-- KEY SHARE lock until they commit; a takeover needs FOR UPDATE on it. So writes of two holders never overlap, and one
-- whose lease was taken writes nothing. Settings are other columns (NO KEY UPDATE), so changing them waits for nobody.
ALTER TABLE duties
  ALTER COLUMN holder DROP NOT NULL,
  ADD COLUMN fence bigint NOT NULL DEFAULT 0,
  ADD COLUMN held_since timestamptz,
  ADD COLUMN paused boolean NOT NULL DEFAULT false,
  ADD COLUMN interval_ms bigint CHECK (interval_ms BETWEEN 10 AND 86400000), -- NULL: default_interval_ms
  ADD COLUMN default_interval_ms bigint NOT NULL DEFAULT 1000,               -- as the holder's configuration says
  ADD COLUMN run_requested boolean NOT NULL DEFAULT false,
  ADD COLUMN running boolean NOT NULL DEFAULT false,
  ADD COLUMN failures bigint NOT NULL DEFAULT 0,
  ADD COLUMN rows_handled bigint NOT NULL DEFAULT 0,
  ADD COLUMN last_duration_ms bigint,
  ADD COLUMN last_rows bigint;
ALTER TABLE duties SET (fillfactor = 20, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_cost_delay = 0);

-- First statement of every transaction of a duty's run.
CREATE FUNCTION duty_check(p_name text, p_holder uuid, p_fence bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = sandbar, pg_temp AS $$
BEGIN
  PERFORM 1 FROM duties WHERE name = p_name AND holder = p_holder AND fence = p_fence FOR KEY SHARE;
  RETURN FOUND;
END $$;

-- ---------------------------------------------------------------- dead letters

-- One row per invocation that ended dead, written in the transaction that ended it; the fingerprint is filled in by a
-- duty, so that an ack pays for a narrow insert and only when something died.
CREATE TABLE dead_letters (
  tenant_id     uuid NOT NULL,
  invocation_id uuid NOT NULL,
  task_id       uuid NOT NULL,
  version       int NOT NULL,
  reason        text NOT NULL,
  died_at       timestamptz NOT NULL,
  fingerprint   bytea CHECK (octet_length(fingerprint) = 8),
  summary       text,                  -- of the failure, for people
  redriven_as   uuid,
  redriven_at   timestamptz,
  PRIMARY KEY (tenant_id, invocation_id)
);
CREATE INDEX dead_letters_groups ON dead_letters (tenant_id, task_id, fingerprint, invocation_id);
CREATE INDEX dead_letters_new ON dead_letters (died_at) WHERE fingerprint IS NULL;

CREATE FUNCTION dead_letter() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  INSERT INTO dead_letters (tenant_id, invocation_id, task_id, version, reason, died_at)
    SELECT NEW.tenant_id, NEW.invocation_id, i.task_id, i.version, NEW.reason, NEW.finished_at
    FROM invocations i WHERE i.tenant_id = NEW.tenant_id AND i.invocation_id = NEW.invocation_id
    ON CONFLICT DO NOTHING;
  RETURN NULL;
END $$;
CREATE TRIGGER dead_letter AFTER INSERT ON results FOR EACH ROW WHEN (NEW.state = 'dead') EXECUTE FUNCTION dead_letter();

INSERT INTO dead_letters (tenant_id, invocation_id, task_id, version, reason, died_at)
  SELECT r.tenant_id, r.invocation_id, i.task_id, i.version, r.reason, r.finished_at
  FROM results r JOIN invocations i USING (tenant_id, invocation_id) WHERE r.state = 'dead';

-- ---------------------------------------------------------------- bulk operations

CREATE TABLE bulk_operations (
  tenant_id   uuid NOT NULL REFERENCES tenants,
  bulk_id     uuid NOT NULL,           -- version 7: what was accepted after it is not its business
  action      text NOT NULL CHECK (action IN ('cancel', 'pause', 'resume', 'reprioritise', 'retry', 'purge')),
  filter      jsonb NOT NULL,
  priority    smallint CHECK (priority BETWEEN -100 AND 100),
  version     int,
  rate        int CHECK (rate BETWEEN 1 AND 10000), -- per second; NULL: as fast as it goes
  state       text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'running', 'done', 'cancelled', 'failed')),
  -- Where it is: written in the transaction that did the rows before it, so a crash repeats and skips nothing.
  stage       text,
  after_rank  timestamptz,
  after_id    uuid,
  matched     bigint NOT NULL DEFAULT 0,
  done        bigint NOT NULL DEFAULT 0,
  skipped     bigint NOT NULL DEFAULT 0, -- had moved on before it was their turn
  failed      bigint NOT NULL DEFAULT 0,
  error       text,
  not_before  timestamptz NOT NULL DEFAULT now(),
  created_at  timestamptz NOT NULL DEFAULT now(),
  started_at  timestamptz,
  finished_at timestamptz,
  PRIMARY KEY (tenant_id, bulk_id)
);
CREATE INDEX bulk_operations_open ON bulk_operations (not_before) WHERE state IN ('waiting', 'running');

-- ---------------------------------------------------------------- who may what

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['dead_letters', 'bulk_operations'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY worker ON %I TO sandbar_worker USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY definer ON %I TO sandbar_definer USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

REVOKE EXECUTE ON FUNCTION worker_gone, duty_check, dead_letter FROM PUBLIC;
GRANT EXECUTE ON FUNCTION duty_check TO sandbar_worker;

-- Workers and duties belong to no tenant: app::auth lets only the platform's role come here.
GRANT SELECT ON workers, workers_gone, duties TO sandbar_api;
GRANT UPDATE (wanted) ON workers TO sandbar_api;
GRANT UPDATE (paused, interval_ms, run_requested) ON duties TO sandbar_api;
GRANT SELECT, INSERT, DELETE ON workers_gone TO sandbar_worker;

GRANT SELECT, UPDATE (redriven_as, redriven_at) ON dead_letters TO sandbar_api;
GRANT SELECT, UPDATE, DELETE ON dead_letters TO sandbar_worker;
GRANT SELECT, INSERT ON dead_letters TO sandbar_definer;
GRANT SELECT, INSERT, UPDATE (state, finished_at) ON bulk_operations TO sandbar_api;
GRANT SELECT, UPDATE, DELETE ON bulk_operations TO sandbar_worker;

GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION dead_letter OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;

-- ---------------------------------------------------------------- why does it wait

-- The fleet as far as somebody who waits may know it: how many workers claim, their slots and attempts, and the part of
-- the weight of all who wait that is this tenant's. Looks at 1,000 tenants at most.
CREATE FUNCTION fleet() RETURNS TABLE (workers bigint, claiming bigint, slots bigint, running bigint, share double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT count(*), count(*) FILTER (WHERE w.wanted = 'active'),
    COALESCE(sum(w.slots) FILTER (WHERE w.wanted = 'active'), 0), COALESCE(sum(w.running) FILTER (WHERE w.wanted = 'active'), 0),
    (SELECT COALESCE(max(m.weight)::double precision / NULLIF(COALESCE(sum(r.weight) FILTER (WHERE r.tenant_id <> m.tenant_id), 0) + max(m.weight), 0), 1)
     FROM tenants m LEFT JOIN ready_tenants(1000) r ON true WHERE m.tenant_id = current_tenant())
  FROM workers w
$$;
REVOKE EXECUTE ON FUNCTION fleet FROM PUBLIC;
GRANT EXECUTE ON FUNCTION fleet TO sandbar_api;
GRANT EXECUTE ON FUNCTION ready_tenants TO sandbar_definer;
GRANT SELECT ON workers TO sandbar_definer;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION fleet OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
