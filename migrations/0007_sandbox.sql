-- The sandbox as the control plane sees it: the walls around cells, modules that kill them, files and artifacts.

-- Which walls of the kernel stand around the cells of a worker: {"seccomp": true, …}. NULL until its cells are up.
ALTER TABLE workers ADD COLUMN IF NOT EXISTS walls jsonb;
