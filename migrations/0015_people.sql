-- Tenants that can be suspended and deleted; people: users, memberships, invitations, sessions, and the keys that sign
-- their tokens.

-- ---------------------------------------------------------------- tenants

ALTER TABLE tenants
  ADD COLUMN state        text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended', 'deleting')),
  ADD COLUMN changed_at   timestamptz,
  ADD COLUMN delete_after timestamptz; -- deleting: everything goes from then on
CREATE INDEX tenants_to_erase ON tenants (delete_after) WHERE state = 'deleting';

-- The platform's view: tenants of all, hence SECURITY DEFINER; app::auth lets only the platform's role come here.
CREATE FUNCTION tenant_list(p_id uuid, p_after text, p_limit bigint)
RETURNS TABLE (tenant_id uuid, name text, weight int, state text, created_at timestamptz, changed_at timestamptz, delete_after timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT t.tenant_id, t.name, t.weight, t.state, t.created_at, t.changed_at, t.delete_after FROM tenants t
  WHERE (p_id IS NULL OR t.tenant_id = p_id) AND t.name > p_after ORDER BY t.name LIMIT p_limit
$$;

CREATE FUNCTION tenant_create(p_id uuid, p_name text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  WITH made AS (INSERT INTO tenants (tenant_id, name) VALUES (p_id, p_name) ON CONFLICT DO NOTHING RETURNING 1)
  SELECT EXISTS (SELECT 1 FROM made)
$$;

-- False: there is none, or it is past the point where it could be changed. With p_cancel what runs is asked to stop.
CREATE FUNCTION tenant_change(p_id uuid, p_state text, p_delete_after timestamptz, p_cancel boolean) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  UPDATE tenants t SET state = p_state, delete_after = p_delete_after, changed_at = clock_timestamp()
    WHERE t.tenant_id = p_id AND (t.delete_after IS NULL OR t.delete_after > clock_timestamp());
  IF NOT FOUND THEN RETURN false; END IF;
  IF p_cancel THEN
    INSERT INTO cancels (tenant_id, invocation_id)
      SELECT p_id, u.invocation_id
      FROM leases l CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts) AS u(tenant_id, invocation_id, attempt)
      WHERE u.tenant_id = p_id AND NOT EXISTS (SELECT 1 FROM attempts a
        WHERE a.tenant_id = u.tenant_id AND a.invocation_id = u.invocation_id AND a.attempt = u.attempt)
      ON CONFLICT DO NOTHING;
  END IF;
  RETURN true;
END $$;

-- Take rows of a tenant whose time has come, at most p_limit of each table; in the end the tenant itself. Tables come from
-- the catalogue, so a new one is not forgotten; what others still refer to waits for the next run. As the owner, who alone
-- may delete everywhere. Returns how many rows went.
CREATE FUNCTION erase_tenant(p_limit int) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid;
  r record;
  n bigint;
  total bigint := 0;
  held boolean := false;
BEGIN
  SELECT x.tenant_id INTO t FROM tenants x WHERE x.state = 'deleting' AND x.delete_after <= clock_timestamp()
    ORDER BY x.delete_after LIMIT 1 FOR UPDATE SKIP LOCKED;
  -- What runs ends first: its end has to have somewhere to go.
  IF NOT FOUND OR EXISTS (SELECT 1 FROM leases l WHERE t = ANY (l.tenants)) THEN RETURN 0; END IF;
  FOR r IN SELECT c.oid::regclass AS name FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    WHERE c.relnamespace = 'sandbar'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
      AND a.attname = 'tenant_id' AND NOT a.attisdropped AND c.relname NOT IN ('tenants', 'audit')
  LOOP
    BEGIN
      EXECUTE format('DELETE FROM %s WHERE tenant_id = $1 AND (tableoid, ctid) IN '
                     '(SELECT tableoid, ctid FROM %s WHERE tenant_id = $1 LIMIT $2)', r.name, r.name) USING t, p_limit;
      GET DIAGNOSTICS n = ROW_COUNT;
      total := total + n;
    EXCEPTION WHEN foreign_key_violation THEN held := true;
    END;
  END LOOP;
  IF total = 0 AND NOT held THEN
    DELETE FROM tenants x WHERE x.tenant_id = t;
    DELETE FROM audit x WHERE x.tenant_id = t;
    total := 1;
  END IF;
  RETURN total;
END $$;

-- ---------------------------------------------------------------- people

-- Users belong to no tenant. The API reaches them by the functions below only.
CREATE TABLE users (
  user_id       uuid PRIMARY KEY,
  email         text NOT NULL UNIQUE CHECK (email = lower(email) AND octet_length(email) BETWEEN 3 AND 254),
  name          text NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 200),
  password_hash text NOT NULL,         -- argon2id, in PHC form
  created_at    timestamptz NOT NULL DEFAULT now(),
  password_at   timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE memberships (
  tenant_id  uuid NOT NULL REFERENCES tenants,
  user_id    uuid NOT NULL REFERENCES users,
  role       text NOT NULL CHECK (role IN ('platform', 'owner', 'admin', 'developer', 'operator', 'viewer')),
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, user_id)
);
CREATE INDEX memberships_of ON memberships (user_id);

CREATE TABLE invitations (
  tenant_id     uuid NOT NULL REFERENCES tenants,
  invitation_id uuid NOT NULL,
  email         text NOT NULL,
  role          text NOT NULL CHECK (role IN ('platform', 'owner', 'admin', 'developer', 'operator', 'viewer')),
  hash          bytea NOT NULL UNIQUE CHECK (octet_length(hash) = 32), -- sha256 of the 256 random bits of the link
  invited_by    text NOT NULL,
  created_at    timestamptz NOT NULL DEFAULT now(),
  expires_at    timestamptz NOT NULL,
  accepted_at   timestamptz,
  PRIMARY KEY (tenant_id, invitation_id)
);

-- A login; its refresh tokens are a chain of which only the last one works.
CREATE TABLE sessions (
  session_id uuid PRIMARY KEY,
  user_id    uuid NOT NULL REFERENCES users ON DELETE CASCADE,
  acts_in    uuid NOT NULL,            -- the tenant
  created_at timestamptz NOT NULL DEFAULT now(),
  expires_at timestamptz NOT NULL,
  ended_at   timestamptz
);
CREATE INDEX sessions_of ON sessions (user_id);
CREATE INDEX sessions_by_expiry ON sessions (expires_at);
CREATE TABLE refresh_tokens (
  hash       bytea PRIMARY KEY CHECK (octet_length(hash) = 32),
  session_id uuid NOT NULL REFERENCES sessions ON DELETE CASCADE,
  used_at    timestamptz
);
CREATE INDEX refresh_tokens_of ON refresh_tokens (session_id);

-- Failed logins by the hash of the address that was tried, whether or not somebody has it: a lock tells nothing.
CREATE TABLE login_failures (
  email_hash   bytea PRIMARY KEY,
  failures     int NOT NULL,
  last_at      timestamptz NOT NULL,
  locked_until timestamptz
);
CREATE INDEX login_failures_by_age ON login_failures (last_at);

-- Keys that sign access tokens. The newest signs; older ones verify until what they signed has expired.
CREATE TABLE issuer_keys (
  kid        text PRIMARY KEY,
  seed       bytea NOT NULL CHECK (octet_length(seed) = 32), -- of an Ed25519 key
  public     bytea NOT NULL CHECK (octet_length(public) = 32),
  created_at timestamptz NOT NULL DEFAULT now()
);

-- ---------------------------------------------------------------- ways to what belongs to no tenant

-- A key of a person: it may what its person may, and nothing when that is no member any more.
ALTER TABLE api_keys ADD COLUMN user_id uuid REFERENCES users ON DELETE CASCADE;
CREATE INDEX api_keys_of ON api_keys (user_id) WHERE user_id IS NOT NULL;
GRANT SELECT (user_id) ON api_keys TO sandbar_api;

-- As find_key, with the state of the tenant, and for the key of a person with the role that the person has now.
CREATE FUNCTION identify_key(p_hash bytea)
RETURNS TABLE (tenant_id uuid, key_id uuid, name text, role text, scopes text[], expires_at timestamptz, hash bytea, state text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT k.tenant_id, k.key_id, k.name, COALESCE(m.role, k.role), k.scopes, k.expires_at, k.hash, t.state
  FROM api_keys k JOIN tenants t ON t.tenant_id = k.tenant_id
    LEFT JOIN memberships m ON m.tenant_id = k.tenant_id AND m.user_id = k.user_id
  WHERE k.hash = p_hash AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())
    AND (k.user_id IS NULL OR m.user_id IS NOT NULL)
$$;

-- What a session may now: its user's membership may have changed since it began.
CREATE FUNCTION identify_session(p_session uuid)
RETURNS TABLE (user_id uuid, name text, tenant_id uuid, role text, state text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT u.user_id, u.name, m.tenant_id, m.role, t.state
  FROM sessions s JOIN users u USING (user_id) JOIN memberships m ON m.user_id = s.user_id AND m.tenant_id = s.acts_in
    JOIN tenants t ON t.tenant_id = m.tenant_id
  WHERE s.session_id = p_session AND s.ended_at IS NULL AND s.expires_at > clock_timestamp()
$$;

CREATE FUNCTION user_find(p_email text, p_user uuid) RETURNS TABLE (user_id uuid, email text, name text, password_hash text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT u.user_id, u.email, u.name, u.password_hash FROM users u WHERE u.email = p_email OR u.user_id = p_user
$$;

CREATE FUNCTION user_tenants(p_user uuid) RETURNS TABLE (tenant_id uuid, name text, role text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT t.tenant_id, t.name, m.role FROM memberships m JOIN tenants t USING (tenant_id)
  WHERE m.user_id = p_user ORDER BY m.created_at, t.name
$$;

-- Set a password, and end every session but one.
CREATE FUNCTION user_password(p_user uuid, p_hash text, p_but uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  UPDATE users SET password_hash = p_hash, password_at = clock_timestamp() WHERE user_id = p_user;
  UPDATE sessions SET ended_at = clock_timestamp()
    WHERE user_id = p_user AND ended_at IS NULL AND session_id IS DISTINCT FROM p_but;
$$;

-- Seconds until the lock of an address opens; 0: it is open.
CREATE FUNCTION login_locked(p_email_hash bytea) RETURNS double precision
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT COALESCE(max(GREATEST(EXTRACT(EPOCH FROM f.locked_until - clock_timestamp()), 0)), 0)::double precision
  FROM login_failures f WHERE f.email_hash = p_email_hash
$$;

-- After p_free failures each further one locks for twice as long, from p_first up to p_most. NULL p_free: it went well.
CREATE FUNCTION login_tried(p_email_hash bytea, p_free int, p_first interval, p_most interval) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  IF p_free IS NULL THEN DELETE FROM login_failures WHERE email_hash = p_email_hash; RETURN; END IF;
  INSERT INTO login_failures AS f (email_hash, failures, last_at) VALUES (p_email_hash, 1, clock_timestamp())
    ON CONFLICT (email_hash) DO UPDATE SET failures = LEAST(f.failures + 1, 1000), last_at = clock_timestamp(),
      locked_until = CASE WHEN f.failures + 1 < p_free THEN NULL
        ELSE clock_timestamp() + LEAST(p_most, p_first * power(2, LEAST(f.failures + 1 - p_free, 20))) END;
END $$;

CREATE FUNCTION session_open(p_session uuid, p_user uuid, p_tenant uuid, p_hash bytea, p_life interval) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  INSERT INTO sessions (session_id, user_id, acts_in, expires_at)
    VALUES (p_session, p_user, p_tenant, clock_timestamp() + p_life);
  INSERT INTO refresh_tokens (hash, session_id) VALUES (p_hash, p_session);
$$;

-- Exchange a refresh token. 'fine'; 'unknown'; 'reused': somebody else has it, so the whole session has ended; 'stranger':
-- the user is no member of p_tenant (NULL: stays where it is).
CREATE FUNCTION session_refresh(p_hash bytea, p_new bytea, p_tenant uuid)
RETURNS TABLE (outcome text, session_id uuid, user_id uuid, tenant_id uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
#variable_conflict use_column
DECLARE
  s record;
BEGIN
  SELECT x.session_id, x.user_id, x.acts_in, r.used_at INTO s FROM refresh_tokens r JOIN sessions x USING (session_id)
    WHERE r.hash = p_hash AND x.ended_at IS NULL AND x.expires_at > clock_timestamp() FOR UPDATE;
  session_id := s.session_id; user_id := s.user_id; tenant_id := COALESCE(p_tenant, s.acts_in);
  IF s.session_id IS NULL THEN outcome := 'unknown'; RETURN NEXT; RETURN; END IF;
  IF s.used_at IS NOT NULL THEN
    UPDATE sessions x SET ended_at = clock_timestamp() WHERE x.session_id = s.session_id;
    outcome := 'reused'; RETURN NEXT; RETURN;
  END IF;
  IF NOT EXISTS (SELECT 1 FROM memberships m WHERE m.user_id = s.user_id AND m.tenant_id = COALESCE(p_tenant, s.acts_in)) THEN
    outcome := 'stranger'; RETURN NEXT; RETURN;
  END IF;
  UPDATE refresh_tokens r SET used_at = clock_timestamp() WHERE r.hash = p_hash;
  INSERT INTO refresh_tokens (hash, session_id) VALUES (p_new, s.session_id);
  UPDATE sessions x SET acts_in = COALESCE(p_tenant, x.acts_in) WHERE x.session_id = s.session_id;
  outcome := 'fine'; RETURN NEXT;
END $$;

CREATE FUNCTION session_end(p_session uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  UPDATE sessions SET ended_at = clock_timestamp() WHERE session_id = p_session AND ended_at IS NULL
$$;

CREATE FUNCTION invitation_find(p_hash bytea) RETURNS TABLE (tenant_id uuid, tenant text, email text, role text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT i.tenant_id, t.name, i.email, i.role FROM invitations i JOIN tenants t USING (tenant_id)
  WHERE i.hash = p_hash AND i.accepted_at IS NULL AND i.expires_at > clock_timestamp() AND t.state = 'active'
$$;

-- Take an invitation: make the user if p_password is given, and the membership. NULL: somebody was quicker.
CREATE FUNCTION invitation_accept(p_hash bytea, p_user uuid, p_name text, p_password text) RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  i record;
  u uuid;
BEGIN
  UPDATE invitations x SET accepted_at = clock_timestamp()
    WHERE x.hash = p_hash AND x.accepted_at IS NULL AND x.expires_at > clock_timestamp()
    RETURNING x.tenant_id, x.email, x.role INTO i;
  IF NOT FOUND THEN RETURN NULL; END IF;
  IF p_password IS NOT NULL THEN
    INSERT INTO users (user_id, email, name, password_hash) VALUES (p_user, i.email, p_name, p_password) RETURNING user_id INTO u;
  ELSE
    SELECT x.user_id INTO STRICT u FROM users x WHERE x.email = i.email AND x.user_id = p_user;
  END IF;
  INSERT INTO memberships (tenant_id, user_id, role) VALUES (i.tenant_id, u, i.role)
    ON CONFLICT (tenant_id, user_id) DO NOTHING;
  RETURN u;
END $$;

-- Members of this session's tenant, with their names.
CREATE FUNCTION members(p_user uuid, p_after uuid, p_limit bigint)
RETURNS TABLE (user_id uuid, email text, name text, role text, created_at timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT u.user_id, u.email, u.name, m.role, m.created_at FROM memberships m JOIN users u USING (user_id)
  WHERE m.tenant_id = current_tenant() AND (p_user IS NULL OR m.user_id = p_user) AND (p_after IS NULL OR m.user_id > p_after)
  ORDER BY m.user_id LIMIT p_limit
$$;

-- Change the role of a member of this session's tenant, or remove it (NULL). 'done'; 'unknown'; 'last': it is the only owner.
CREATE FUNCTION member_change(p_user uuid, p_role text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := current_tenant();
  old text;
BEGIN
  -- One after the other in a tenant, so that two owners cannot remove each other.
  PERFORM 1 FROM tenants x WHERE x.tenant_id = t FOR NO KEY UPDATE;
  SELECT m.role INTO old FROM memberships m WHERE m.tenant_id = t AND m.user_id = p_user;
  IF NOT FOUND THEN RETURN 'unknown'; END IF;
  IF old IN ('owner', 'platform') AND p_role IS DISTINCT FROM old AND NOT EXISTS (SELECT 1 FROM memberships m
      WHERE m.tenant_id = t AND m.user_id <> p_user AND m.role IN ('owner', 'platform')) THEN RETURN 'last'; END IF;
  IF p_role IS NULL THEN
    DELETE FROM memberships m WHERE m.tenant_id = t AND m.user_id = p_user;
  ELSE
    UPDATE memberships m SET role = p_role WHERE m.tenant_id = t AND m.user_id = p_user;
  END IF;
  RETURN 'done';
END $$;

CREATE FUNCTION issuer_keys_read() RETURNS TABLE (kid text, seed bytea, public bytea, created_at timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT k.kid, k.seed, k.public, k.created_at FROM issuer_keys k ORDER BY k.created_at DESC LIMIT 16
$$;

-- Add a key unless there is one younger than p_age; and forget those older than p_forget.
CREATE FUNCTION issuer_key_add(p_kid text, p_seed bytea, p_public bytea, p_age interval, p_forget interval) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  LOCK TABLE issuer_keys IN SHARE ROW EXCLUSIVE MODE; -- two servers make one
  DELETE FROM issuer_keys WHERE created_at < clock_timestamp() - p_forget;
  INSERT INTO issuer_keys (kid, seed, public)
    SELECT p_kid, p_seed, p_public
    WHERE NOT EXISTS (SELECT 1 FROM issuer_keys k WHERE k.created_at > clock_timestamp() - p_age);
END $$;

-- Forget what is over: sessions, failed logins, invitations. Returns how many.
CREATE FUNCTION people_tidy(p_limit bigint) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  WITH s AS (DELETE FROM sessions WHERE session_id IN
    (SELECT session_id FROM sessions WHERE expires_at < clock_timestamp() ORDER BY expires_at LIMIT p_limit) RETURNING 1),
  f AS (DELETE FROM login_failures WHERE email_hash IN (SELECT email_hash FROM login_failures
    WHERE last_at < clock_timestamp() - interval '1 day' ORDER BY last_at LIMIT p_limit) RETURNING 1)
  SELECT (SELECT count(*) FROM s) + (SELECT count(*) FROM f)
$$;

-- ---------------------------------------------------------------- who may what

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['memberships', 'invitations'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant ON %I TO sandbar_api USING (tenant_id = (SELECT current_tenant())) '
                   'WITH CHECK (tenant_id = (SELECT current_tenant()))', t);
    EXECUTE format('CREATE POLICY definer ON %I TO sandbar_definer USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY owner ON %I TO CURRENT_USER USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;

GRANT SELECT (tenant_id, invitation_id, email, role, invited_by, created_at, expires_at, accepted_at), INSERT, DELETE
  ON invitations TO sandbar_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON users, memberships, invitations, sessions, refresh_tokens, login_failures, issuer_keys
  TO sandbar_definer;
GRANT INSERT ON tenants, cancels TO sandbar_definer;
GRANT SELECT ON cancels TO sandbar_definer;
GRANT UPDATE (state, delete_after, changed_at) ON tenants TO sandbar_definer;

GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
DO $$
DECLARE f regprocedure;
BEGIN
  FOREACH f IN ARRAY ARRAY['tenant_list(uuid,text,bigint)', 'tenant_create(uuid,text)',
      'tenant_change(uuid,text,timestamptz,boolean)', 'identify_key(bytea)', 'identify_session(uuid)', 'user_find(text,uuid)',
      'user_tenants(uuid)', 'user_password(uuid,text,uuid)', 'login_locked(bytea)',
      'login_tried(bytea,integer,interval,interval)', 'session_open(uuid,uuid,uuid,bytea,interval)',
      'session_refresh(bytea,bytea,uuid)', 'session_end(uuid)', 'invitation_find(bytea)',
      'invitation_accept(bytea,uuid,text,text)', 'members(uuid,uuid,bigint)', 'member_change(uuid,text)', 'issuer_keys_read()',
      'issuer_key_add(text,bytea,bytea,interval,interval)']::regprocedure[] LOOP
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO sandbar_api', f);
    EXECUTE format('ALTER FUNCTION %s OWNER TO sandbar_definer', f);
  END LOOP;
END $$;
REVOKE EXECUTE ON FUNCTION erase_tenant, people_tidy FROM PUBLIC;
GRANT EXECUTE ON FUNCTION erase_tenant, people_tidy TO sandbar_worker;
ALTER FUNCTION people_tidy OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;

-- As before, but tenants that are suspended or going have no turn.
CREATE OR REPLACE FUNCTION ready_tenants(p_limit int) RETURNS TABLE (tenant_id uuid, weight int, free int)
LANGUAGE sql STABLE SET search_path = sandbar, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
  WITH RECURSIVE jump AS (
    (SELECT r.tenant_id, 1 AS n FROM ready r ORDER BY r.tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.tenant_id FROM ready r WHERE r.tenant_id > j.tenant_id ORDER BY r.tenant_id LIMIT 1), j.n + 1
    FROM jump j WHERE j.tenant_id IS NOT NULL AND j.n < p_limit
  )
  SELECT t.tenant_id, t.weight, c.cap - c.running
  FROM jump j JOIN tenants t ON t.tenant_id = j.tenant_id
  LEFT JOIN caps c ON c.tenant_id = t.tenant_id AND c.scope = 0
  WHERE (c.cap IS NULL OR c.running < c.cap) AND t.state = 'active'
$$;
