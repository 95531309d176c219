-- What a running run waits for in place, and until when at most: its worker says it with each heartbeat.
-- Run as syncward_owner. Adds only: a worker of the version before says nothing.
ALTER TABLE leases ADD COLUMN waits_for text;
ALTER TABLE leases ADD COLUMN waits_until timestamptz;
