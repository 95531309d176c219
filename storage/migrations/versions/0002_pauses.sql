-- Pauses of accounts and of the whole instance, age promotion, and a cheaper audit check.
-- Run as syncward_owner. Adds only: the version before this one goes on working beside it.

ALTER TABLE accounts DROP CONSTRAINT accounts_state_check;
ALTER TABLE accounts ADD CONSTRAINT accounts_state_check CHECK (state IN ('active', 'paused'));
ALTER TABLE accounts ADD COLUMN state_reason text;

CREATE TABLE instance (  -- one row: what holds for everybody
  id uuid PRIMARY KEY CHECK (id = '00000000-0000-0000-0000-000000000000'),
  state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'paused')),
  state_reason text,
  changed_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO instance (id) VALUES ('00000000-0000-0000-0000-000000000000');
SELECT audit.guard_table('instance', 'id');
GRANT SELECT ON instance TO syncward_scheduler, syncward_worker;
GRANT SELECT, UPDATE ON instance TO syncward_operator;

ALTER TABLE active_runs ADD COLUMN promotions smallint NOT NULL DEFAULT 0;
CREATE INDEX active_runs_waiting ON active_runs (not_before) WHERE state = 'queued';

-- The same rule as before without turning the whole row into a document for each change.
CREATE OR REPLACE FUNCTION audit.require_event() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  row_ record;
  changed uuid;
BEGIN
  IF TG_OP = 'DELETE' THEN row_ := OLD; ELSE row_ := NEW; END IF;
  CASE TG_ARGV[0]
    WHEN 'id' THEN changed := row_.id;
    WHEN 'run_id' THEN changed := row_.run_id;
    WHEN 'connection_id' THEN changed := row_.connection_id;
    WHEN 'resource_id' THEN changed := row_.resource_id;
  END CASE;
  IF NOT EXISTS (
    SELECT FROM audit.event
    WHERE xid = pg_current_xact_id() AND target_id = changed
      AND at BETWEEN now() AND clock_timestamp()
  ) THEN
    RAISE EXCEPTION 'unaudited % of %', lower(TG_OP), TG_TABLE_NAME USING ERRCODE = '42501';
  END IF;
  RETURN NULL;
END $$;
