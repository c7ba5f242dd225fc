-- Texts that people set on a task, for `wasi:config`: {"KEY": "value", …}. NULL: none. The bound is a last one; what may be
-- set is decided before it gets here.
ALTER TABLE tasks ADD COLUMN config jsonb CHECK (jsonb_typeof(config) = 'object' AND octet_length(config::text) <= 1048576);
GRANT UPDATE (config) ON tasks TO sandbar_api;
