-- The core of the control database: tenants, run control, outputs, keystore, audit.
-- Run as syncward_owner. Roles and schemas exist already (storage/roles.py).

-- ── tenants ────────────────────────────────────────────────────────────────────────────────
CREATE TABLE accounts (
  id uuid PRIMARY KEY,
  name text NOT NULL UNIQUE,
  company text NOT NULL DEFAULT '',
  plan text NOT NULL,
  state text NOT NULL DEFAULT 'active' CHECK (state IN ('active')),
  created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE resources (
  id uuid PRIMARY KEY,
  account_id uuid NOT NULL REFERENCES accounts (id),
  name text NOT NULL,
  kind text NOT NULL,
  config jsonb NOT NULL,
  state text NOT NULL DEFAULT 'active' CHECK (state IN ('active')),
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (account_id, id),
  UNIQUE (account_id, name)
);

CREATE TABLE credentials (  -- ciphertext only; the newest version of a field is the one in use
  resource_id uuid NOT NULL,
  field text NOT NULL,
  version integer NOT NULL CHECK (version > 0),
  account_id uuid NOT NULL,
  envelope bytea NOT NULL CHECK (substr(envelope, 1, 2) = 'SY'::bytea),
  fingerprint bytea NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (resource_id, field, version),
  FOREIGN KEY (account_id, resource_id) REFERENCES resources (account_id, id) ON DELETE CASCADE
);

CREATE TABLE connections (
  id uuid PRIMARY KEY,
  account_id uuid NOT NULL REFERENCES accounts (id),
  name text NOT NULL,
  description text NOT NULL DEFAULT '',
  parameters jsonb NOT NULL DEFAULT '{}',
  source_id uuid NOT NULL,
  destination_id uuid NOT NULL,
  target_schema text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (account_id, id),
  UNIQUE (account_id, name),
  FOREIGN KEY (account_id, source_id) REFERENCES resources (account_id, id),
  FOREIGN KEY (account_id, destination_id) REFERENCES resources (account_id, id)
);

CREATE TABLE streams (
  connection_id uuid NOT NULL,
  name text NOT NULL,
  account_id uuid NOT NULL,
  position integer NOT NULL,
  spec jsonb NOT NULL,
  PRIMARY KEY (connection_id, name),
  FOREIGN KEY (account_id, connection_id) REFERENCES connections (account_id, id) ON DELETE CASCADE
);

CREATE TABLE cursors (  -- a copy: the destination's state row decides (docs/connectors.md)
  connection_id uuid NOT NULL,
  stream text NOT NULL,
  account_id uuid NOT NULL,
  cursor jsonb,
  fence bigint NOT NULL,
  updated_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (connection_id, stream),
  FOREIGN KEY (account_id, connection_id) REFERENCES connections (account_id, id) ON DELETE CASCADE
);

-- ── run control: no account policy, so that an unset setting never looks like "nothing to do" ──
CREATE TABLE schedules (
  connection_id uuid PRIMARY KEY REFERENCES connections (id) ON DELETE CASCADE,
  account_id uuid NOT NULL,
  source_id uuid NOT NULL,
  destination_id uuid NOT NULL,
  kind text NOT NULL CHECK (kind IN ('interval', 'cron', 'manual')),
  interval_s integer CHECK (interval_s > 0),
  cron text,
  zone text NOT NULL DEFAULT 'UTC',
  anchor_at timestamptz NOT NULL DEFAULT now(),
  catch_up text NOT NULL DEFAULT 'coalesce' CHECK (catch_up IN ('coalesce', 'skip', 'all')),
  overlap text NOT NULL DEFAULT 'buffer_one'
    CHECK (overlap IN ('buffer_one', 'skip', 'cancel_other')),
  state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'paused')),
  state_reason text,
  next_due_at timestamptz,
  version integer NOT NULL DEFAULT 1,
  fence bigint NOT NULL DEFAULT 0,
  failures integer NOT NULL DEFAULT 0,
  last_success_at timestamptz,
  CHECK ((kind = 'interval') = (interval_s IS NOT NULL)),
  CHECK ((kind = 'cron') = (cron IS NOT NULL))
) WITH (fillfactor = 80);
CREATE INDEX schedules_due ON schedules (next_due_at)
  WHERE state = 'active' AND next_due_at IS NOT NULL;

CREATE TABLE account_queues (
  account_id uuid PRIMARY KEY REFERENCES accounts (id) ON DELETE CASCADE,
  weight real NOT NULL DEFAULT 1 CHECK (weight > 0),
  runs_max integer NOT NULL CHECK (runs_max > 0),
  paused boolean NOT NULL DEFAULT false,
  has_work boolean NOT NULL DEFAULT false,
  at_cap boolean NOT NULL DEFAULT false,
  vtime double precision NOT NULL DEFAULT 0
) WITH (fillfactor = 70);
CREATE INDEX account_queues_pick ON account_queues (vtime)
  WHERE has_work AND NOT at_cap AND NOT paused;

CREATE TABLE resource_queues (
  resource_id uuid PRIMARY KEY REFERENCES resources (id) ON DELETE CASCADE,
  runs_max integer NOT NULL CHECK (runs_max > 0)
);

CREATE TABLE active_runs (
  subject_id uuid PRIMARY KEY,  -- a connection or a resource: at most one live run each
  run_id uuid NOT NULL UNIQUE,
  account_id uuid NOT NULL,
  kind text NOT NULL CHECK (kind IN ('sync', 'test', 'discover')),
  source_id uuid,
  destination_id uuid,
  state text NOT NULL
    CHECK (state IN ('queued', 'dispatched', 'running', 'awaiting_approval')),
  trigger text NOT NULL CHECK (trigger IN ('schedule', 'manual', 'again')),
  scheduled_for timestamptz NOT NULL,
  priority smallint NOT NULL,
  options jsonb NOT NULL DEFAULT '{}',
  queued_at timestamptz NOT NULL DEFAULT now(),
  not_before timestamptz NOT NULL DEFAULT now(),
  deadline_at timestamptz,
  dispatch integer NOT NULL DEFAULT 0,
  dispatch_deadline timestamptz,
  started_at timestamptz,
  attempt integer NOT NULL DEFAULT 0,
  attempts_without_progress integer NOT NULL DEFAULT 0,
  lost_leases integer NOT NULL DEFAULT 0,
  lease_token uuid,
  worker_id text,
  error_code text,
  error text,
  cancel_requested_at timestamptz,
  cancel_by text,
  again_run_id uuid,
  again_trigger text,
  again_options jsonb,
  CHECK ((state = 'running') = (lease_token IS NOT NULL)),
  CHECK ((state = 'dispatched') = (dispatch_deadline IS NOT NULL)),
  CHECK ((again_run_id IS NULL) = (again_trigger IS NULL))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX active_runs_ready ON active_runs (account_id, priority, not_before, run_id)
  WHERE state = 'queued';
CREATE INDEX active_runs_busy ON active_runs (account_id) WHERE state IN ('dispatched', 'running');
CREATE INDEX active_runs_redispatch ON active_runs (dispatch_deadline) WHERE state = 'dispatched';

CREATE TABLE leases (  -- narrow and without an index on expires_at: renewals stay HOT
  run_id uuid PRIMARY KEY,
  token uuid NOT NULL,
  worker_id text NOT NULL,
  expires_at timestamptz NOT NULL,
  stream text,
  rows bigint NOT NULL DEFAULT 0,
  bytes bigint NOT NULL DEFAULT 0,
  progress_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

CREATE TABLE workers (
  worker_id text PRIMARY KEY,
  version text NOT NULL,
  slots integer NOT NULL,
  draining boolean NOT NULL DEFAULT false,
  started_at timestamptz NOT NULL DEFAULT now(),
  seen_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

CREATE TABLE slots (  -- the ledger that makes "no slot vanished" a SQL assertion
  scheduled_for timestamptz NOT NULL,
  connection_id uuid NOT NULL,
  outcome text NOT NULL CHECK (outcome IN ('queued', 'merged', 'skipped')),
  run_id uuid,
  PRIMARY KEY (scheduled_for, connection_id)
) PARTITION BY RANGE (scheduled_for);

CREATE TABLE runs (
  finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  run_id uuid NOT NULL,
  account_id uuid NOT NULL,
  kind text NOT NULL,
  subject_id uuid NOT NULL,
  state text NOT NULL CHECK (state IN ('succeeded', 'failed', 'cancelled')),
  trigger text NOT NULL,
  scheduled_for timestamptz NOT NULL,
  queued_at timestamptz NOT NULL,
  started_at timestamptz,
  attempt integer NOT NULL,
  fence bigint NOT NULL,
  worker_id text,
  error_code text,
  error text,
  PRIMARY KEY (finished_at, run_id)
) PARTITION BY RANGE (finished_at);
CREATE INDEX runs_by_id ON runs (run_id);
CREATE INDEX runs_by_subject ON runs (subject_id, finished_at DESC);
CREATE INDEX runs_by_account ON runs (account_id, finished_at DESC);

-- ── what runs leave behind ─────────────────────────────────────────────────────────────────
CREATE TABLE run_streams (
  run_id uuid NOT NULL,
  stream text NOT NULL,
  account_id uuid NOT NULL,
  position integer NOT NULL,
  state text NOT NULL CHECK (state IN ('succeeded', 'failed', 'skipped', 'cancelled')),
  mode text NOT NULL,
  rows_extracted bigint NOT NULL,
  rows_loaded bigint NOT NULL,
  rows_inserted bigint NOT NULL,
  rows_updated bigint NOT NULL,
  rows_unchanged bigint NOT NULL,
  rows_deleted bigint NOT NULL,
  rows_rejected bigint NOT NULL,
  bytes bigint NOT NULL,
  cursor_from jsonb,
  cursor_to jsonb,
  seconds double precision NOT NULL,
  schema_hash text,
  attempt integer NOT NULL,
  error text,
  finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (run_id, stream),
  CHECK (state <> 'succeeded' OR rows_loaded = rows_extracted - rows_rejected),
  CHECK (rows_loaded = rows_inserted + rows_updated + rows_unchanged)
);

CREATE TABLE run_outputs (
  run_id uuid PRIMARY KEY,
  account_id uuid NOT NULL,
  document jsonb NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE run_logs (
  at timestamptz NOT NULL DEFAULT clock_timestamp(),
  run_id uuid NOT NULL,
  seq bigint GENERATED ALWAYS AS IDENTITY,
  account_id uuid NOT NULL,
  level text NOT NULL CHECK (level IN ('debug', 'info', 'warning', 'error')),
  stream text,
  message text NOT NULL,
  PRIMARY KEY (at, run_id, seq)
) PARTITION BY RANGE (at);
CREATE INDEX run_logs_by_run ON run_logs (run_id, seq);

-- ── keystore: wrapped data keys, readable by workers only ──────────────────────────────────
CREATE TABLE keystore.dek (
  id uuid PRIMARY KEY,
  account_id uuid NOT NULL,
  purpose text NOT NULL CHECK (purpose IN ('credentials', 'records')),
  root_id uuid NOT NULL,
  wrapped bytea NOT NULL,
  state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'decrypt_only')),
  created_at timestamptz NOT NULL DEFAULT now()
);

-- ── audit: append only, stamped and hashed by the database (docs/audit.md) ─────────────────
CREATE TABLE audit.event (
  seq bigint GENERATED ALWAYS AS IDENTITY,
  xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
  at timestamptz NOT NULL DEFAULT clock_timestamp(),
  account_id uuid,
  class text NOT NULL CHECK (class IN ('A', 'B')),
  action text NOT NULL,
  target_kind text NOT NULL,
  target_id uuid NOT NULL,
  body text NOT NULL CHECK (octet_length(body) <= 65536),
  login text NOT NULL DEFAULT '',
  client text NOT NULL DEFAULT '',
  leaf bytea NOT NULL DEFAULT ''::bytea,
  PRIMARY KEY (at, seq)
) PARTITION BY RANGE (at);
CREATE INDEX event_by_transaction ON audit.event (xid, target_id);
CREATE INDEX event_by_target ON audit.event (target_id, at);
CREATE INDEX event_by_account ON audit.event (account_id, at);
ALTER TABLE audit.event ENABLE ROW LEVEL SECURITY;  -- enabled, not forced: its triggers must see it

CREATE FUNCTION audit.field(part text) RETURNS bytea
  LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
  RETURN convert_to(octet_length(coalesce(part, ''))::text || ':' || coalesce(part, '') || ',', 'UTF8');

CREATE FUNCTION audit.leaf(at timestamptz, account_id uuid, class text, action text,
    target_kind text, target_id uuid, login text, client text, body text) RETURNS bytea
  LANGUAGE sql STABLE SET search_path = pg_catalog
  RETURN sha256('\x00'::bytea || audit.field('syncward/audit/v1')
    || audit.field(to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'))
    || audit.field(account_id::text) || audit.field(class) || audit.field(action)
    || audit.field(target_kind) || audit.field(target_id::text)
    || audit.field(login) || audit.field(client) || audit.field(body));

CREATE FUNCTION audit.stamp() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  NEW.login := session_user;
  NEW.client := coalesce(host(inet_client_addr()), 'local');
  NEW.leaf := audit.leaf(NEW.at, NEW.account_id, NEW.class, NEW.action, NEW.target_kind,
    NEW.target_id, NEW.login, NEW.client, NEW.body);
  RETURN NEW;
END $$;
CREATE TRIGGER stamp BEFORE INSERT ON audit.event FOR EACH ROW EXECUTE FUNCTION audit.stamp();
ALTER TABLE audit.event ENABLE ALWAYS TRIGGER stamp;

CREATE FUNCTION audit.deny() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  RAISE EXCEPTION 'the audit log is append-only (%)', TG_OP USING ERRCODE = '42501';
END $$;

-- TG_ARGV: the column of the changed row that an event of this transaction must target.
CREATE FUNCTION audit.require_event() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  changed uuid := (to_jsonb(CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END) ->> TG_ARGV[0])::uuid;
BEGIN
  IF NOT EXISTS (
    SELECT FROM audit.event
    WHERE xid = pg_current_xact_id() AND target_id = changed
      AND at BETWEEN now() AND clock_timestamp()
  ) THEN
    RAISE EXCEPTION 'unaudited % of %', lower(TG_OP), TG_TABLE_NAME USING ERRCODE = '42501';
  END IF;
  RETURN NULL;
END $$;

CREATE FUNCTION audit.guard_table(guarded regclass, id_column text) RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  EXECUTE format('CREATE CONSTRAINT TRIGGER audited AFTER INSERT OR DELETE ON %s
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    EXECUTE FUNCTION audit.require_event(%L)', guarded, id_column);
  IF EXISTS (SELECT FROM pg_attribute
             WHERE attrelid = guarded AND attname = 'state' AND NOT attisdropped) THEN
    EXECUTE format('CREATE CONSTRAINT TRIGGER audited_state AFTER UPDATE OF state ON %s
      DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state)
      EXECUTE FUNCTION audit.require_event(%L)', guarded, id_column);
  END IF;
  EXECUTE format('CREATE TRIGGER no_truncate BEFORE TRUNCATE ON %s
    FOR EACH STATEMENT EXECUTE FUNCTION audit.deny()', guarded);
END $$;

SELECT audit.guard_table('accounts', 'id');
SELECT audit.guard_table('resources', 'id');
SELECT audit.guard_table('credentials', 'resource_id');
SELECT audit.guard_table('connections', 'id');
SELECT audit.guard_table('schedules', 'connection_id');
SELECT audit.guard_table('active_runs', 'run_id');

-- ── partitions: months ahead, made by the scheduler through a definer ──────────────────────
CREATE FUNCTION ensure_partitions(months_ahead integer DEFAULT 3) RETURNS SETOF text
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  parent regclass;
  lower_bound timestamptz;
  upper_bound timestamptz;
  part text;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('syncward.ensure_partitions'));
  FOREACH parent IN ARRAY ARRAY['public.slots', 'public.runs', 'public.run_logs', 'audit.event']::regclass[] LOOP
    FOR month IN 0..months_ahead LOOP
      lower_bound := date_trunc('month', now(), 'UTC') + make_interval(months => month);
      upper_bound := lower_bound + interval '1 month';
      part := (SELECT relname FROM pg_class WHERE oid = parent)
        || '_' || to_char(lower_bound AT TIME ZONE 'UTC', 'YYYYMM');
      CONTINUE WHEN EXISTS (SELECT FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid
                            WHERE i.inhparent = parent AND c.relname = part);
      EXECUTE format('CREATE TABLE %I.%I PARTITION OF %s FOR VALUES FROM (%L) TO (%L)',
        (SELECT nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.oid = parent), part, parent, lower_bound, upper_bound);
      IF parent = 'audit.event'::regclass THEN
        PERFORM audit.seal_partition(('audit.' || part)::regclass);
      END IF;
      RETURN NEXT part;
    END LOOP;
  END LOOP;
END $$;

CREATE FUNCTION audit.seal_partition(part regclass) RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', part);
  EXECUTE format('CREATE TRIGGER no_change BEFORE UPDATE OR DELETE ON %s
    FOR EACH ROW EXECUTE FUNCTION audit.deny()', part);
  EXECUTE format('CREATE TRIGGER no_truncate BEFORE TRUNCATE ON %s
    FOR EACH STATEMENT EXECUTE FUNCTION audit.deny()', part);
  EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER no_change', part);
  EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER no_truncate', part);
END $$;

CREATE TABLE slots_default PARTITION OF slots DEFAULT;
CREATE TABLE runs_default PARTITION OF runs DEFAULT;
CREATE TABLE run_logs_default PARTITION OF run_logs DEFAULT;
CREATE TABLE audit.event_default PARTITION OF audit.event DEFAULT;
SELECT audit.seal_partition('audit.event_default');
SELECT ensure_partitions();

-- ── credentials leave only to the worker that holds the run's live lease ───────────────────
CREATE FUNCTION sealed_credentials(for_run uuid, lease uuid)
  RETURNS TABLE (resource_id uuid, field text, version integer, envelope bytea,
                 dek_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog
  BEGIN ATOMIC
    SELECT c.resource_id, c.field, c.version, c.envelope, d.id, d.root_id, d.wrapped
    FROM active_runs a
    JOIN leases l ON l.run_id = a.run_id AND l.token = a.lease_token
    JOIN credentials c ON c.account_id = a.account_id
      AND c.resource_id IN (a.source_id, a.destination_id)
    JOIN keystore.dek d ON d.account_id = c.account_id
      AND d.id = encode(substr(c.envelope, 5, 16), 'hex')::uuid
    WHERE a.run_id = for_run AND l.token = lease AND a.state = 'running'
      AND l.expires_at > clock_timestamp()
      AND c.version = (SELECT max(n.version) FROM credentials n
                       WHERE n.resource_id = c.resource_id AND n.field = c.field);
  END;

-- ── row-level security ─────────────────────────────────────────────────────────────────────
CREATE FUNCTION current_account() RETURNS uuid
  LANGUAGE sql STABLE
  RETURN nullif(current_setting('syncward.account_id', true), '')::uuid;

DO $$
DECLARE
  t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['resources', 'credentials', 'connections', 'streams', 'cursors',
                           'run_streams', 'run_outputs', 'run_logs', 'keystore.dek'] LOOP
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY owner_all ON %s TO syncward_owner USING (true) WITH CHECK (true)', t);
    EXECUTE format('CREATE POLICY account_only ON %s TO syncward_worker, syncward_operator
      USING (account_id = current_account()) WITH CHECK (account_id = current_account())', t);
    EXECUTE format('CREATE POLICY operator_across ON %s FOR SELECT TO syncward_operator
      USING (current_setting(''syncward.across_accounts'', true) = ''on'')', t);
  END LOOP;
END $$;

CREATE POLICY append ON audit.event FOR INSERT
  TO syncward_scheduler, syncward_worker, syncward_operator WITH CHECK (true);
CREATE POLICY operator_reads ON audit.event FOR SELECT TO syncward_operator USING (true);

-- ── least grants ───────────────────────────────────────────────────────────────────────────
REVOKE ALL ON FUNCTION ensure_partitions(integer), sealed_credentials(uuid, uuid),
  audit.require_event(), audit.stamp(), audit.guard_table(regclass, text),
  audit.seal_partition(regclass) FROM PUBLIC;

GRANT EXECUTE ON FUNCTION ensure_partitions(integer) TO syncward_scheduler;
GRANT SELECT ON alembic_version TO syncward_scheduler, syncward_worker, syncward_operator;
GRANT SELECT ON accounts, resource_queues, workers TO syncward_scheduler;
GRANT SELECT, UPDATE ON schedules, account_queues TO syncward_scheduler;
GRANT SELECT, INSERT, UPDATE, DELETE ON active_runs TO syncward_scheduler;
GRANT SELECT, DELETE ON leases TO syncward_scheduler;
GRANT DELETE ON workers TO syncward_scheduler;
GRANT SELECT, INSERT ON slots, runs TO syncward_scheduler;

GRANT EXECUTE ON FUNCTION sealed_credentials(uuid, uuid) TO syncward_worker;
GRANT SELECT ON accounts, resources, connections, streams TO syncward_worker;
GRANT SELECT, UPDATE ON schedules, account_queues TO syncward_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON active_runs, leases, workers, cursors, run_streams
  TO syncward_worker;
GRANT SELECT, INSERT ON runs, run_outputs, run_logs TO syncward_worker;
GRANT UPDATE ON run_outputs TO syncward_worker;

GRANT SELECT, INSERT, UPDATE, DELETE ON accounts, resources, connections, streams, schedules,
  account_queues, resource_queues, active_runs TO syncward_operator;
GRANT SELECT, DELETE ON cursors TO syncward_operator;
GRANT INSERT, DELETE, SELECT (resource_id, field, version, account_id, fingerprint, created_at)
  ON credentials TO syncward_operator;
GRANT INSERT, DELETE, SELECT (id, account_id, purpose, root_id, state, created_at)
  ON keystore.dek TO syncward_operator;
GRANT SELECT ON leases, workers, slots, run_streams, run_outputs, run_logs, audit.event
  TO syncward_operator;
GRANT SELECT, INSERT ON runs TO syncward_operator;

GRANT INSERT (account_id, class, action, target_kind, target_id, body) ON audit.event
  TO syncward_scheduler, syncward_worker, syncward_operator;
