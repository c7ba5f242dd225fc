-- Which tenant a token of an issuer elsewhere means: the API's role sees no tenant before it knows whose request it has.
CREATE FUNCTION identify_tenant(p_name text) RETURNS TABLE (tenant_id uuid, state text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = sandbar, pg_temp AS $$
  SELECT t.tenant_id, t.state FROM tenants t WHERE t.name = p_name
$$;
REVOKE EXECUTE ON FUNCTION identify_tenant FROM PUBLIC;
GRANT EXECUTE ON FUNCTION identify_tenant TO sandbar_api;
GRANT CREATE ON SCHEMA sandbar TO sandbar_definer;
ALTER FUNCTION identify_tenant OWNER TO sandbar_definer;
REVOKE CREATE ON SCHEMA sandbar FROM sandbar_definer;
