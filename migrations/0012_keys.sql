-- API keys: who made them, what they are narrowed to, until when, and when they were last used. Roles as in
-- domain::permission, which has the table of what each may.

ALTER TABLE api_keys DROP CONSTRAINT api_keys_role_check;
ALTER TABLE api_keys ADD CONSTRAINT api_keys_role_check
  CHECK (role IN ('platform', 'owner', 'admin', 'developer', 'operator', 'viewer'));

ALTER TABLE api_keys
  ADD COLUMN name         text NOT NULL DEFAULT '' CHECK (octet_length(name) <= 200),
  ADD COLUMN scopes       text[] NOT NULL DEFAULT '{}', -- as domain::permission::Scope writes them; none: all of the role
  ADD COLUMN created_by   text,                -- for people; the audit log has the id
  ADD COLUMN expires_at   timestamptz,
  ADD COLUMN last_used_at timestamptz,         -- written now and then, not with each use
  ADD COLUMN replaced_by  uuid;                -- the key that a rotation made in its place
CREATE INDEX api_keys_by_prefix ON api_keys (tenant_id, prefix text_pattern_ops);

-- Who is behind a key, by the hash of the key. The API calls it before it knows a tenant, hence SECURITY DEFINER. The
-- hash comes back so that the caller can compare it by itself, in constant time.
CREATE FUNCTION find_key(p_hash bytea)
RETURNS TABLE (tenant_id uuid, key_id uuid, name text, role text, scopes text[], expires_at timestamptz, hash bytea)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT k.tenant_id, k.key_id, k.name, k.role, k.scopes, k.expires_at, k.hash FROM api_keys k
  WHERE k.hash = p_hash AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())
$$;

-- A server from before this migration knows no scopes, no expiry and two roles: it refuses what it would misread.
CREATE OR REPLACE FUNCTION authenticate_key(p_hash bytea) RETURNS TABLE (tenant_id uuid, key_id uuid, role text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT k.tenant_id, k.key_id, k.role FROM api_keys k
  WHERE k.hash = p_hash AND k.revoked_at IS NULL AND k.expires_at IS NULL AND k.scopes = '{}'
    AND k.role IN ('admin', 'platform')
$$;

-- When keys were last used; keys of many tenants at once, hence SECURITY DEFINER.
CREATE FUNCTION keys_used(p_tenants uuid[], p_keys uuid[], p_at timestamptz[]) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  UPDATE api_keys k SET last_used_at = u.at
  FROM unnest(p_tenants, p_keys, p_at) AS u(tenant_id, key_id, at)
  WHERE k.tenant_id = u.tenant_id AND k.key_id = u.key_id AND (k.last_used_at IS NULL OR k.last_used_at < u.at)
$$;

REVOKE EXECUTE ON FUNCTION find_key, keys_used FROM PUBLIC;
GRANT EXECUTE ON FUNCTION find_key, keys_used TO sandbar_api;
GRANT UPDATE (last_used_at) ON api_keys TO sandbar_definer;
-- Never the hash: nothing that runs as the API needs to read it.
GRANT SELECT (tenant_id, key_id, prefix, role, created_at, revoked_at, name, scopes, created_by, expires_at, last_used_at,
  replaced_by) ON api_keys TO sandbar_api;
GRANT INSERT ON api_keys TO sandbar_api;
GRANT UPDATE (name, scopes, expires_at, replaced_by, revoked_at) ON api_keys TO sandbar_api;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION find_key OWNER TO sandbar_definer;
ALTER FUNCTION keys_used OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
