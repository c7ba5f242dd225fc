-- One-time tokens with which a user who lost the password sets a new one. Somebody who may hand them over makes them; nothing
-- is sent by anybody here.
CREATE TABLE password_resets (
  user_id    uuid PRIMARY KEY REFERENCES users ON DELETE CASCADE, -- one at a time: a new one takes the place of the last
  hash       bytea NOT NULL UNIQUE CHECK (octet_length(hash) = 32), -- sha256 of the 256 random bits of the token
  made_in    uuid,                     -- the tenant whose people made it; NULL: the platform did
  expires_at timestamptz NOT NULL
);

-- Make a token. In a tenant (not p_platform) only for a user who is a member of this session's tenant and of no other: whoever
-- has the token has the user's other tenants, too. Until when it can be used; NULL: it may not be made.
CREATE FUNCTION reset_make(p_user uuid, p_hash bytea, p_platform boolean, p_life interval) RETURNS timestamptz
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  t uuid := CASE WHEN p_platform THEN NULL ELSE current_tenant() END;
  until timestamptz := clock_timestamp() + p_life;
BEGIN
  IF NOT p_platform AND (t IS NULL OR (SELECT array_agg(m.tenant_id) FROM memberships m WHERE m.user_id = p_user) IS DISTINCT FROM ARRAY[t]) THEN
    RETURN NULL;
  END IF;
  INSERT INTO password_resets AS r (user_id, hash, made_in, expires_at) VALUES (p_user, p_hash, t, until)
    ON CONFLICT (user_id) DO UPDATE SET hash = EXCLUDED.hash, made_in = EXCLUDED.made_in, expires_at = EXCLUDED.expires_at;
  RETURN until;
END $$;

-- Whose password a token may set now. One that a tenant made is good only while its user is in no other tenant.
CREATE FUNCTION reset_find(p_hash bytea) RETURNS uuid
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT r.user_id FROM password_resets r WHERE r.hash = p_hash AND r.expires_at > clock_timestamp()
    AND (r.made_in IS NULL OR (SELECT array_agg(m.tenant_id) FROM memberships m WHERE m.user_id = r.user_id) = ARRAY[r.made_in])
$$;

-- Use a token: the password is this from now on, the user's sessions and own keys have ended. NULL: somebody was quicker, or it
-- is over. Locks of the address stay: a token is no way around them.
CREATE FUNCTION reset_use(p_hash bytea, p_password text) RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
DECLARE
  u uuid := reset_find(p_hash);
BEGIN
  DELETE FROM password_resets r WHERE r.hash = p_hash AND r.user_id = u;
  IF NOT FOUND THEN RETURN NULL; END IF;
  UPDATE users x SET password_hash = p_password, password_at = clock_timestamp() WHERE x.user_id = u;
  UPDATE sessions x SET ended_at = clock_timestamp() WHERE x.user_id = u AND x.ended_at IS NULL;
  UPDATE api_keys k SET revoked_at = clock_timestamp() WHERE k.user_id = u AND k.revoked_at IS NULL;
  RETURN u;
END $$;

-- As before, and tokens that are over.
CREATE OR REPLACE FUNCTION people_tidy(p_limit bigint) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  WITH s AS (DELETE FROM sessions WHERE session_id IN
    (SELECT session_id FROM sessions WHERE expires_at < clock_timestamp() ORDER BY expires_at LIMIT p_limit) RETURNING 1),
  f AS (DELETE FROM login_failures WHERE email_hash IN (SELECT email_hash FROM login_failures
    WHERE last_at < clock_timestamp() - interval '1 day' ORDER BY last_at LIMIT p_limit) RETURNING 1),
  r AS (DELETE FROM password_resets WHERE user_id IN (SELECT user_id FROM password_resets
    WHERE expires_at < clock_timestamp() LIMIT p_limit) RETURNING 1)
  SELECT (SELECT count(*) FROM s) + (SELECT count(*) FROM f) + (SELECT count(*) FROM r)
$$;

GRANT SELECT, INSERT, UPDATE, DELETE ON password_resets TO sandbar_definer;
GRANT UPDATE (revoked_at) ON api_keys TO sandbar_definer;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
DO $$
DECLARE f regprocedure;
BEGIN
  FOREACH f IN ARRAY ARRAY['reset_make(uuid,bytea,boolean,interval)', 'reset_find(bytea)', 'reset_use(bytea,text)']::regprocedure[] LOOP
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO sandbar_api', f);
    EXECUTE format('ALTER FUNCTION %s OWNER TO sandbar_definer', f);
  END LOOP;
END $$;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
