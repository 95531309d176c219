-- Every outbound call of a run over HTTP: never what it asked or was told. Run as syncward_owner.
-- Adds only: the version before makes no rows here, and its retention drops and deletes them as well.
CREATE TABLE api_calls (
  at timestamptz NOT NULL,
  run_id uuid NOT NULL,
  seq bigint GENERATED ALWAYS AS IDENTITY,
  account_id uuid NOT NULL,
  attempt integer NOT NULL,
  method text NOT NULL,
  host text NOT NULL,
  route text NOT NULL,  -- as a manifest writes it, with its placeholders
  status smallint,      -- none: no answer came
  error text,
  request_bytes bigint NOT NULL,
  response_bytes bigint NOT NULL,
  milliseconds integer NOT NULL,
  PRIMARY KEY (at, run_id, seq)
) PARTITION BY RANGE (at);
CREATE INDEX api_calls_by_run ON api_calls (run_id, seq);
CREATE TABLE api_calls_default PARTITION OF api_calls DEFAULT;

CREATE OR REPLACE FUNCTION ensure_partitions(months_ahead integer DEFAULT 3) RETURNS SETOF text
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  parent regclass;
  lower_bound timestamptz;
  upper_bound timestamptz;
  part text;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('syncward.ensure_partitions'));
  FOREACH parent IN ARRAY ARRAY['public.slots', 'public.runs', 'public.run_logs', 'public.api_calls',
                                'audit.event']::regclass[] LOOP
    FOR month IN 0..months_ahead LOOP
      lower_bound := date_trunc('month', now(), 'UTC') + make_interval(months => month);
      upper_bound := lower_bound + interval '1 month';
      part := (SELECT relname FROM pg_class WHERE oid = parent)
        || '_' || to_char(lower_bound AT TIME ZONE 'UTC', 'YYYYMM');
      CONTINUE WHEN EXISTS (SELECT FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid
                            WHERE i.inhparent = parent AND c.relname = part);
      BEGIN
        EXECUTE format('CREATE TABLE %I.%I PARTITION OF %s FOR VALUES FROM (%L) TO (%L)',
          (SELECT nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           WHERE c.oid = parent), part, parent, lower_bound, upper_bound);
      EXCEPTION WHEN check_violation THEN
        -- The default partition has rows of this month, from a clock that was ahead: they stay
        -- there, those that come go there, and every other table and month has its own.
        CONTINUE;
      END;
      IF parent = 'audit.event'::regclass THEN
        PERFORM audit.seal_partition(('audit.' || part)::regclass);
      END IF;
      RETURN NEXT part;
    END LOOP;
  END LOOP;
END $$;
SELECT ensure_partitions();

-- What retention takes of a run, with its calls; the answer counts what it counted before.
CREATE OR REPLACE FUNCTION expire_runs(for_account uuid, older_than timestamptz, batch integer)
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
  ), c AS (
    DELETE FROM public.api_calls t USING old WHERE t.run_id = old.run_id
  )
  SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM s), (SELECT count(*) FROM o),
         (SELECT count(*) FROM l);
END $$;

CREATE OR REPLACE FUNCTION drop_partitions(runs_before timestamptz, slots_before timestamptz)
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
                          'public.run_logs'::regclass, 'public.api_calls'::regclass)
      AND c.relname ~ '_[0-9]{6}$'
      AND to_timestamp(right(c.relname, 6), 'YYYYMM') + interval '1 month'
        < CASE WHEN i.inhparent = 'public.slots'::regclass THEN slots_before ELSE runs_before END
    ORDER BY c.relname
  LOOP
    EXECUTE format('DROP TABLE %s', part.name);
    RETURN NEXT part.relname;
  END LOOP;
END $$;

ALTER TABLE api_calls ENABLE ROW LEVEL SECURITY;
ALTER TABLE api_calls FORCE ROW LEVEL SECURITY;
CREATE POLICY owner_all ON api_calls TO syncward_owner USING (true) WITH CHECK (true);
CREATE POLICY account_only ON api_calls FOR INSERT TO syncward_worker
  WITH CHECK (account_id = current_account());
CREATE POLICY account_reads ON api_calls FOR SELECT TO syncward_operator
  USING (account_id = current_account());
CREATE POLICY operator_across ON api_calls FOR SELECT TO syncward_operator
  USING (current_setting('syncward.across_accounts', true) = 'on');
GRANT INSERT ON api_calls TO syncward_worker;
GRANT SELECT ON api_calls TO syncward_operator;
