-- Keys that sign access tokens may be sealed by the master key: `master` names it by its fingerprint, and `seed` is what the
-- program sealed. Without it the seed is in the clear, as in an installation without a master key.
ALTER TABLE issuer_keys ADD COLUMN master text;
ALTER TABLE issuer_keys DROP CONSTRAINT issuer_keys_seed_check;
ALTER TABLE issuer_keys ADD CONSTRAINT issuer_keys_seed_check
  CHECK (CASE WHEN master IS NULL THEN octet_length(seed) = 32 ELSE octet_length(seed) BETWEEN 33 AND 256 END);

CREATE FUNCTION issuer_keys_list() RETURNS TABLE (kid text, seed bytea, public bytea, created_at timestamptz, master text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT k.kid, k.seed, k.public, k.created_at, k.master FROM issuer_keys k ORDER BY k.created_at DESC LIMIT 16
$$;

-- As issuer_key_add, with the master key that seals it (NULL: none does).
CREATE FUNCTION issuer_key_make(p_kid text, p_seed bytea, p_public bytea, p_master text, p_age interval, p_forget interval) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  LOCK TABLE issuer_keys IN SHARE ROW EXCLUSIVE MODE; -- two servers make one
  DELETE FROM issuer_keys WHERE created_at < clock_timestamp() - p_forget;
  INSERT INTO issuer_keys (kid, seed, public, master)
    SELECT p_kid, p_seed, p_public, p_master
    WHERE NOT EXISTS (SELECT 1 FROM issuer_keys k WHERE k.created_at > clock_timestamp() - p_age);
END $$;

-- Replace what is stored of a key by the same sealed, if it is still what was read. False: it is not.
CREATE FUNCTION issuer_key_seal(p_kid text, p_old bytea, p_seed bytea, p_master text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
BEGIN
  UPDATE issuer_keys k SET seed = p_seed, master = p_master WHERE k.kid = p_kid AND k.seed = p_old AND p_master IS NOT NULL;
  RETURN FOUND;
END $$;

-- Keys that another master key than this one seals, to be sealed anew. None in the clear: whoever asks has no use for it.
CREATE FUNCTION issuer_keys_sealed(p_master text) RETURNS TABLE (kid text, seed bytea, master text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT k.kid, k.seed, k.master FROM issuer_keys k WHERE k.master <> p_master ORDER BY k.created_at DESC LIMIT 16
$$;

GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
DO $$
DECLARE f regprocedure;
BEGIN
  FOREACH f IN ARRAY ARRAY['issuer_keys_list()', 'issuer_key_make(text,bytea,bytea,text,interval,interval)',
      'issuer_key_seal(text,bytea,bytea,text)', 'issuer_keys_sealed(text)']::regprocedure[] LOOP
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f);
    EXECUTE format('ALTER FUNCTION %s OWNER TO sandbar_definer', f);
  END LOOP;
END $$;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
GRANT EXECUTE ON FUNCTION issuer_keys_list, issuer_key_make, issuer_key_seal TO sandbar_api;
GRANT EXECUTE ON FUNCTION issuer_keys_sealed, issuer_key_seal TO sandbar_worker;
