-- An ack that freed a slot or queued a retry did not tell those who depend on its ends: `settle(…) OR woken` is not
-- evaluated when woken is true already, and they waited for the duty. Nothing was lost by it. The rest of `ack` stays as
-- 0008 made it, so that it is written once.
DO $$
DECLARE
  short constant text := 'woken := (SELECT s.released > 0 FROM settle(e_t, e_i, 500) s) OR woken;';
  whole constant text := 'IF (SELECT s.released > 0 FROM settle(e_t, e_i, 500) s) THEN woken := true; END IF;';
  body text := pg_get_functiondef('ack'::regproc);
BEGIN
  IF position(short IN body) = 0 THEN
    RAISE EXCEPTION 'ack is not as 0008 made it';
  END IF;
  EXECUTE replace(body, short, whole);
END $$;
