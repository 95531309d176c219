-- What of a stream's table changed with a run. Run as syncward_owner. Adds only: the version before
-- this one writes none.
ALTER TABLE run_streams ADD COLUMN schema_changes jsonb NOT NULL DEFAULT '[]';
