-- How many failed runs in a row pause a connection (NULL: never), and how long a run was told to wait.
-- Run as syncward_owner. Adds only: the version before this one goes on working beside it.

ALTER TABLE schedules ADD COLUMN pause_after integer DEFAULT 10 CHECK (pause_after >= 1);
ALTER TABLE active_runs ADD COLUMN deferred_for interval NOT NULL DEFAULT '00:00:00';
