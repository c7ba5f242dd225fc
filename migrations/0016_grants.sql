-- What tasks may reach.

-- Capabilities given to a task by its tenant: {"http": ["https://api.example.com:443", …]}. NULL: none. What a module
-- wishes for is in its manifest and gives it nothing.
ALTER TABLE tasks ADD COLUMN grants jsonb;
GRANT UPDATE (grants) ON tasks TO sandbar_api;
