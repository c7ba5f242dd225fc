-- Versions without a module: the worker makes the request that their bytes describe. They are ready as soon as they are there.
ALTER TABLE versions DROP CONSTRAINT versions_kind_check;
ALTER TABLE versions ADD CONSTRAINT versions_kind_check CHECK (kind IN ('task', 'command-p1', 'command-p2', 'http'));
