-- Policies ask for the session's tenant themselves and not by a subquery: a subquery is a plan of its own, for each table and
-- each statement, which cost a read of one invocation more than all that it reads. The function is inlined, and as a condition of
-- an index it is evaluated once a scan, as before. New policies do the same: `tenant_id = current_tenant()`.
DO $$
DECLARE
  asked constant text := '( SELECT current_tenant() AS current_tenant)';
  p record;
BEGIN
  FOR p IN
    SELECT o.polname, o.polrelid::regclass AS name, pg_get_expr(o.polqual, o.polrelid) AS reads,
      pg_get_expr(o.polwithcheck, o.polrelid) AS writes
    FROM pg_policy o JOIN pg_class c ON c.oid = o.polrelid WHERE c.relnamespace = 'sandbar'::regnamespace
  LOOP
    IF position(asked IN p.reads) > 0 THEN
      EXECUTE format('ALTER POLICY %I ON %s USING (%s)', p.polname, p.name, replace(p.reads, asked, 'current_tenant()'));
    END IF;
    IF position(asked IN p.writes) > 0 THEN
      EXECUTE format('ALTER POLICY %I ON %s WITH CHECK (%s)', p.polname, p.name, replace(p.writes, asked, 'current_tenant()'));
    END IF;
  END LOOP;
END $$;
