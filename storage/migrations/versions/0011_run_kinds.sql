-- Backfill, reset, purge and schema are kinds of runs on a connection, too. Run as syncward_owner.
-- Adds only: the version before promises a run of the live one's kind, and writes no again_kind.
ALTER TABLE active_runs ADD COLUMN again_kind text,
  DROP CONSTRAINT active_runs_kind_check,
  ADD CONSTRAINT active_runs_kind_check
    CHECK (kind IN ('sync', 'backfill', 'reset', 'purge', 'schema', 'test', 'discover')),
  ADD CONSTRAINT active_runs_again_kind_check
    CHECK (again_kind IN ('sync', 'backfill', 'reset', 'purge', 'schema', 'test', 'discover'));
-- Which kinds a worker knows; empty of the version before, which leaves others to be dispatched again.
ALTER TABLE workers ADD COLUMN kinds text[] NOT NULL DEFAULT '{}';
