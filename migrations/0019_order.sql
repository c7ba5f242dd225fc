-- Order of service by when the server took each invocation, which its id says (UUIDv7, milliseconds since 1970 in the
-- first 48 bits), and not by when its flush began its transaction: a batch of 1,000 is two flushes that go side by side,
-- and item 500 was served before item 0.

-- When an invocation was accepted. A server whose clock is wrong gains nothing by it and delays its rows by a minute at
-- most. STABLE, so that it is inlined.
CREATE FUNCTION accepted_at(p_id uuid) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
AS $$ SELECT LEAST(now(), GREATEST(now() - interval '1 minute',
  to_timestamp(('x0000' || left(translate(p_id::text, '-', ''), 12))::bit(64)::bigint / 1000.0))) $$;
REVOKE EXECUTE ON FUNCTION accepted_at FROM PUBLIC;
GRANT EXECUTE ON FUNCTION accepted_at TO sandbar_definer;

-- The rest of `enqueue` stays as 0008 made it, so that it is written once.
DO $$
DECLARE
  -- What it says, how often, and what it is to say.
  edits constant text[] := ARRAY[
    ['rank_of(now(), u.run_at, u.priority)', '2', 'rank_of(accepted_at(u.id), u.run_at, u.priority)'],
    ['      concurrency_key, concurrency_limit)', '1', '      concurrency_key, concurrency_limit, created_at)'],
    ['(u.extra #>> ''{concurrency,limit}'')::int', '1', '(u.extra #>> ''{concurrency,limit}'')::int, accepted_at(u.id)']];
  body text := pg_get_functiondef('enqueue'::regproc);
  edit text[];
BEGIN
  FOREACH edit SLICE 1 IN ARRAY edits LOOP
    IF (length(body) - length(replace(body, edit[1], ''))) / length(edit[1]) <> edit[2]::int THEN
      RAISE EXCEPTION 'enqueue is not as 0008 made it: %', edit[1];
    END IF;
    body := replace(body, edit[1], edit[3]);
  END LOOP;
  EXECUTE body;
END $$;
