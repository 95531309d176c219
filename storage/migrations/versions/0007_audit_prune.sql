-- Old months of the audit log go: asked for by one login, approved by another, recorded in the log.
-- Run as syncward_owner. Adds only. docs/audit-retention.md says who does what.

CREATE TABLE audit.prune (
  id uuid PRIMARY KEY,
  state text NOT NULL CHECK (state IN
    ('requested', 'replaced', 'approved', 'recorded', 'done', 'withdrawn')),
  before timestamptz NOT NULL,     -- the first moment that is kept: a month begins
  first_kept bigint NOT NULL CHECK (first_kept >= 0),
  also bigint[] NOT NULL CHECK (cardinality(also) <= 10000),
  sha256 text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),  -- of the export's SHA256SUMS
  requested_by text NOT NULL,
  request_seq bigint NOT NULL,     -- each step names its event
  request_at timestamptz NOT NULL,
  approved_by text CHECK (approved_by <> requested_by),
  approval_seq bigint,
  approval_at timestamptz,
  record_seq bigint,
  record_at timestamptz,
  partitions text[],
  withdrawn_by text,
  withdrawal_seq bigint,
  withdrawal_at timestamptz,
  CHECK (state <> 'withdrawn' OR withdrawal_seq IS NOT NULL AND withdrawn_by IS NOT NULL),
  CHECK (state IN ('requested', 'replaced', 'withdrawn') OR approval_seq IS NOT NULL AND approved_by IS NOT NULL),
  CHECK (state NOT IN ('recorded', 'done') OR record_seq IS NOT NULL)
);
CREATE UNIQUE INDEX prune_one_at_a_time ON audit.prune ((true))
  WHERE state IN ('requested', 'approved', 'recorded');

-- The event of this transaction that says so about this request.
CREATE FUNCTION audit.prune_event(said text, of uuid) RETURNS audit.event
  LANGUAGE plpgsql STABLE SET search_path = pg_catalog AS $$
DECLARE found audit.event;
BEGIN
  SELECT * INTO found FROM audit.event e
    WHERE e.xid = pg_current_xact_id_if_assigned() AND e.at >= now() AND e.action = said
      AND e.target_id = '00000000-0000-0000-0000-000000000000'
      AND e.body::jsonb #>> '{detail,request}' = of::text
      AND e.body::jsonb ->> 'outcome' = 'success' AND e.login = session_user
    ORDER BY e.at DESC LIMIT 1;
  IF found.seq IS NULL THEN
    RAISE EXCEPTION 'unaudited: no % of this transaction', said USING ERRCODE = '42501';
  END IF;
  RETURN found;
END $$;

CREATE FUNCTION audit.request_prune(
    request uuid, until timestamptz, kept_from bigint, besides bigint[], export_sha256 text)
  RETURNS void
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE told audit.event := audit.prune_event('audit.prune_requested', request);
BEGIN
  IF until <> date_trunc('month', until, 'UTC') OR until > now() - interval '31 days' THEN
    RAISE EXCEPTION 'whole months older than 31 days only' USING ERRCODE = '22023';
  END IF;
  UPDATE audit.prune SET state = 'replaced' WHERE state = 'requested';
  INSERT INTO audit.prune (id, state, before, first_kept, also, sha256, requested_by, request_seq,
    request_at)
  VALUES (request, 'requested', until, kept_from, besides, export_sha256, session_user, told.seq,
    told.at);
END $$;

-- NULL if the request is approved now; else why not: unknown, not_open, same_login.
CREATE FUNCTION audit.approve_prune(request uuid) RETURNS text
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  asked audit.prune;
  told audit.event;
BEGIN
  SELECT * INTO asked FROM audit.prune WHERE id = request FOR UPDATE;
  IF asked.id IS NULL THEN RETURN 'unknown'; END IF;
  IF asked.state <> 'requested' THEN RETURN 'not_open'; END IF;
  IF asked.requested_by = session_user THEN RETURN 'same_login'; END IF;
  told := audit.prune_event('audit.prune_approved', request);
  UPDATE audit.prune SET state = 'approved', approved_by = session_user, approval_seq = told.seq,
    approval_at = told.at WHERE id = request;
  RETURN NULL;
END $$;

-- NULL if the request is withdrawn now; else why not: unknown, not_open. Any operator may: nothing goes.
CREATE FUNCTION audit.withdraw_prune(request uuid) RETURNS text
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  asked audit.prune;
  told audit.event;
BEGIN
  SELECT * INTO asked FROM audit.prune WHERE id = request FOR UPDATE;
  IF asked.id IS NULL THEN RETURN 'unknown'; END IF;
  IF asked.state NOT IN ('requested', 'approved', 'recorded') THEN RETURN 'not_open'; END IF;
  told := audit.prune_event('audit.prune_withdrawn', request);
  UPDATE audit.prune SET state = 'withdrawn', withdrawn_by = session_user,
    withdrawal_seq = told.seq, withdrawal_at = told.at WHERE id = request;
  RETURN NULL;
END $$;

-- A second time if the key that signed the first record was retired before anything was dropped.
CREATE FUNCTION audit.record_prune(request uuid) RETURNS void
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE told audit.event := audit.prune_event('audit.pruned', request);
BEGIN
  UPDATE audit.prune SET state = 'recorded', record_seq = told.seq, record_at = told.at
  WHERE id = request AND state IN ('approved', 'recorded') AND approved_by <> requested_by;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'prune % is not approved', request USING ERRCODE = '42501';
  END IF;
END $$;

-- Whether this event is sealed within the first so many events of the log.
CREATE FUNCTION audit.sealed_within(of_seq bigint, of_at timestamptz, bound bigint) RETURNS boolean
  LANGUAGE sql STABLE SET search_path = pg_catalog AS $$
    SELECT EXISTS (
      SELECT FROM audit.event e CROSS JOIN audit.epoch p
      CROSS JOIN LATERAL (
        SELECT k.size, k.seqs FROM audit.checkpoint k
        WHERE k.epoch = p.epoch AND (k.last_xid, k.last_seq) >= (e.xid, e.seq)
        ORDER BY k.last_xid, k.last_seq LIMIT 1) AS c
      WHERE e.seq = of_seq AND e.at = of_at AND e.seq = ANY (c.seqs) AND c.size <= bound) $$;

-- Drops the months that a sealed and published record names; returns their names.
CREATE FUNCTION audit.carry_out_prune(request uuid) RETURNS SETOF text
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog SET TimeZone = 'UTC'
  SET DateStyle = 'ISO' AS $$
DECLARE
  asked audit.prune;
  published bigint;
  record_said jsonb;
  part record;
  begins timestamptz;
  gone text[] := '{}';
BEGIN
  SELECT * INTO asked FROM audit.prune WHERE id = request FOR UPDATE;
  SELECT published_size INTO published FROM audit.log;
  IF asked.state IS DISTINCT FROM 'recorded' OR asked.before > now() - interval '31 days'
     OR asked.before <> date_trunc('month', asked.before, 'UTC') THEN
    RAISE EXCEPTION 'prune % is not recorded', request USING ERRCODE = '42501';
  END IF;
  SELECT e.body::jsonb -> 'detail' INTO record_said FROM audit.event e
    WHERE e.seq = asked.record_seq AND e.at = asked.record_at AND e.action = 'audit.pruned';
  IF record_said ->> 'request' IS DISTINCT FROM request::text
     OR record_said ->> 'before' IS DISTINCT FROM to_char(asked.before, 'YYYY-MM-DD')
     OR record_said ->> 'approved_by' IS DISTINCT FROM asked.approved_by
     OR record_said ->> 'requested_by' IS DISTINCT FROM asked.requested_by
     OR NOT audit.sealed_within(asked.record_seq, asked.record_at, published) THEN
    RAISE EXCEPTION 'the record of prune % is not sealed and published', request
      USING ERRCODE = '42501';
  END IF;
  IF asked.approved_by = asked.requested_by OR NOT EXISTS (
    SELECT FROM audit.event a CROSS JOIN audit.event r
    WHERE a.seq = asked.approval_seq AND a.at = asked.approval_at
      AND a.action = 'audit.prune_approved' AND a.login = asked.approved_by
      AND a.body::jsonb #>> '{detail,request}' = request::text
      AND a.body::jsonb ->> 'outcome' = 'success'
      AND r.seq = asked.request_seq AND r.at = asked.request_at
      AND r.action = 'audit.prune_requested' AND r.login = asked.requested_by
      AND r.body::jsonb #>> '{detail,request}' = request::text
  ) THEN
    RAISE EXCEPTION 'prune % was not approved by another login', request USING ERRCODE = '42501';
  END IF;
  IF EXISTS (
    SELECT FROM audit.event e WHERE e.at >= asked.request_at AND e.action = 'audit.prune_withdrawn'
      AND e.body::jsonb #>> '{detail,request}' = request::text
      AND e.body::jsonb ->> 'outcome' = 'success'
  ) THEN
    RAISE EXCEPTION 'prune % was withdrawn', request USING ERRCODE = '42501';
  END IF;
  FOR part IN
    SELECT c.relname, c.oid::regclass AS name, pg_get_expr(c.relpartbound, c.oid) AS bound
    FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid
    WHERE i.inhparent = 'audit.event'::regclass AND c.relname ~ '^event_[0-9]{6}$'
    ORDER BY c.relname
  LOOP
    begins := to_timestamp(right(part.relname, 6), 'YYYYMM');
    CONTINUE WHEN begins + interval '1 month' > asked.before;
    IF part.bound <> format('FOR VALUES FROM (%L) TO (%L)', begins, begins + interval '1 month') THEN
      RAISE EXCEPTION 'audit.% does not hold the month of its name', part.relname
        USING ERRCODE = '42501';
    END IF;
    EXECUTE format('DROP TABLE %s', part.name);
    gone := gone || part.relname::text;
  END LOOP;
  UPDATE audit.prune SET state = 'done', partitions = gone WHERE id = request;
  RETURN QUERY SELECT unnest(gone);
END $$;

REVOKE ALL ON FUNCTION audit.prune_event(text, uuid),
  audit.request_prune(uuid, timestamptz, bigint, bigint[], text), audit.approve_prune(uuid),
  audit.withdraw_prune(uuid), audit.record_prune(uuid), audit.sealed_within(bigint, timestamptz, bigint),
  audit.carry_out_prune(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit.request_prune(uuid, timestamptz, bigint, bigint[], text),
  audit.approve_prune(uuid), audit.withdraw_prune(uuid) TO syncward_operator;
GRANT EXECUTE ON FUNCTION audit.record_prune(uuid), audit.carry_out_prune(uuid) TO syncward_sealer;
GRANT SELECT ON audit.prune TO syncward_operator, syncward_auditor, syncward_sealer;
