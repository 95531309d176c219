-- Pauses of accounts and of the whole instance, live schedulers, age promotion, retention, and a
-- cheaper audit check.
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

-- How often anything asked for a look at an account, so that a dispatcher that looked before notices.
ALTER TABLE account_queues ADD COLUMN woken bigint NOT NULL DEFAULT 0;
-- When a dispatcher last looked, and how many of the account's runs were busy then.
ALTER TABLE account_queues ADD COLUMN looked_at timestamptz;
ALTER TABLE account_queues ADD COLUMN busy_seen integer NOT NULL DEFAULT 0;

-- Cron schedules that share a minute are spread over so long, each always by the same.
ALTER TABLE schedules ADD COLUMN jitter_s integer NOT NULL DEFAULT 0 CHECK (jitter_s >= 0);

-- Slots before this one that passed while nobody could claim them, beyond those with a row of their own.
ALTER TABLE slots ADD COLUMN missed integer NOT NULL DEFAULT 0 CHECK (missed >= 0);

ALTER TABLE active_runs ADD COLUMN promotions smallint NOT NULL DEFAULT 0;
CREATE INDEX active_runs_waiting ON active_runs (not_before) WHERE state = 'queued';

-- The same rule as before without turning the whole row into a document for each change.
CREATE OR REPLACE FUNCTION audit.require_event() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  row_ record;
  changed uuid;
  upto timestamptz := clock_timestamp();  -- a value, so that the planner leaves other months out
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
      AND at BETWEEN now() AND upto
  ) THEN
    RAISE EXCEPTION 'unaudited % of %', lower(TG_OP), TG_TABLE_NAME USING ERRCODE = '42501';
  END IF;
  RETURN NULL;
END $$;

CREATE TABLE schedulers (  -- who is alive, and whether the queue answers it
  scheduler_id text PRIMARY KEY,
  version text NOT NULL,
  started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  queue_down_since timestamptz
) WITH (fillfactor = 50);
GRANT SELECT, INSERT, UPDATE, DELETE ON schedulers TO syncward_scheduler;
GRANT SELECT ON schedulers TO syncward_operator;
GRANT SELECT ON SEQUENCE audit.event_seq_seq TO syncward_scheduler, syncward_operator;

-- ── retention: what a plan no longer keeps, in batches, never anything of the last day ─────
CREATE FUNCTION expire_runs(for_account uuid, older_than timestamptz, batch integer)
  RETURNS TABLE (runs bigint, streams bigint, outputs bigint, log_lines bigint)
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  IF older_than > now() - interval '1 day' THEN
    RAISE EXCEPTION 'retention keeps at least one day' USING ERRCODE = '22023';
  END IF;
  RETURN QUERY
  WITH old AS (
    SELECT r.finished_at, r.run_id FROM public.runs r
    WHERE r.account_id = for_account AND r.finished_at < older_than
    ORDER BY r.finished_at LIMIT batch
  ), gone AS (
    DELETE FROM public.runs r USING old
    WHERE r.finished_at = old.finished_at AND r.run_id = old.run_id RETURNING r.run_id
  ), s AS (
    DELETE FROM public.run_streams t USING old WHERE t.run_id = old.run_id RETURNING 1
  ), o AS (
    DELETE FROM public.run_outputs t USING old WHERE t.run_id = old.run_id RETURNING 1
  ), l AS (
    DELETE FROM public.run_logs t USING old WHERE t.run_id = old.run_id RETURNING 1
  )
  SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM s), (SELECT count(*) FROM o),
         (SELECT count(*) FROM l);
END $$;

-- Drops months that nobody keeps any more; the audit stream is not touched by this.
CREATE FUNCTION drop_partitions(runs_before timestamptz, slots_before timestamptz)
  RETURNS SETOF text
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  part record;
BEGIN
  IF greatest(runs_before, slots_before) > now() - interval '31 days' THEN
    RAISE EXCEPTION 'retention keeps at least one month of partitions' USING ERRCODE = '22023';
  END IF;
  FOR part IN
    SELECT c.oid::regclass AS name, c.relname FROM pg_class c
    JOIN pg_inherits i ON i.inhrelid = c.oid
    WHERE i.inhparent IN ('public.slots'::regclass, 'public.runs'::regclass,
                          'public.run_logs'::regclass)
      AND c.relname ~ '_[0-9]{6}$'
      AND to_timestamp(right(c.relname, 6), 'YYYYMM') + interval '1 month'
        < CASE WHEN i.inhparent = 'public.slots'::regclass THEN slots_before ELSE runs_before END
    ORDER BY c.relname
  LOOP
    EXECUTE format('DROP TABLE %s', part.name);
    RETURN NEXT part.relname;
  END LOOP;
END $$;
REVOKE ALL ON FUNCTION expire_runs(uuid, timestamptz, integer), drop_partitions(timestamptz, timestamptz)
  FROM PUBLIC;
GRANT EXECUTE ON FUNCTION expire_runs(uuid, timestamptz, integer), drop_partitions(timestamptz, timestamptz)
  TO syncward_scheduler, syncward_operator;

-- The same bytes as before, in a form that Postgres inlines into the trigger: a SQL-standard body is
-- bound when it is made, so that no search_path needs setting on each of ten calls per event.
CREATE OR REPLACE FUNCTION audit.field(part text) RETURNS bytea
  LANGUAGE sql IMMUTABLE
  RETURN convert_to(octet_length(coalesce(part, ''))::text || ':' || coalesce(part, '') || ',', 'UTF8');

CREATE OR REPLACE FUNCTION audit.leaf(at timestamptz, account_id uuid, class text, action text,
    target_kind text, target_id uuid, login text, client text, body text) RETURNS bytea
  LANGUAGE sql STABLE
  RETURN sha256('\x00'::bytea || audit.field('syncward/audit/v1')
    || audit.field(to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'))
    || audit.field(account_id::text) || audit.field(class) || audit.field(action)
    || audit.field(target_kind) || audit.field(target_id::text)
    || audit.field(login) || audit.field(client) || audit.field(body));
