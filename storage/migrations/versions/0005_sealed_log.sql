-- The audit log is sealed: events in their order, a Merkle tree over them, signed checkpoints.
-- Run as syncward_owner. Adds only: the version before this one goes on working beside it.

-- One row: which log this is, who seals it, and how far it is sealed and published.
CREATE TABLE audit.log (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  log_id uuid NOT NULL DEFAULT gen_random_uuid(),
  epoch integer NOT NULL DEFAULT 1 CHECK (epoch > 0),
  size bigint NOT NULL DEFAULT 0 CHECK (size >= 0),
  -- The last sealed event: every committed event up to it, in the order of (xid, seq), is sealed.
  last_xid xid8 NOT NULL DEFAULT '0',
  last_seq bigint NOT NULL DEFAULT 0,
  floor_seq bigint NOT NULL DEFAULT 0,  -- the cut of this epoch: the window holds later events
  left_over boolean NOT NULL DEFAULT false,  -- events up to the cut may be left to be sealed
  left_at timestamptz NOT NULL DEFAULT '-infinity',  -- of the last event that was looked at for that
  left_seq bigint NOT NULL DEFAULT 0,
  sealed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  published_size bigint NOT NULL DEFAULT 0 CHECK (published_size <= size),
  published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  holder text NOT NULL DEFAULT '',
  held_until timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO audit.log DEFAULT VALUES;

-- One row for each batch that was sealed: where its events are, and what was signed after them.
CREATE TABLE audit.checkpoint (
  size bigint PRIMARY KEY CHECK (size > 0),  -- of the tree after the batch
  epoch integer NOT NULL,
  seqs bigint[] NOT NULL,                    -- the last of them has index size - 1
  last_xid xid8 NOT NULL,
  last_seq bigint NOT NULL,
  earliest timestamptz NOT NULL,             -- `at` of the events lies between these two
  latest timestamptz NOT NULL,
  root bytea NOT NULL CHECK (octet_length(root) = 32),
  signed_at timestamptz NOT NULL,
  signatures text NOT NULL                   -- lines of a signed note, one for each key
);
CREATE INDEX checkpoint_by_position ON audit.checkpoint (epoch, last_xid, last_seq);
CREATE INDEX checkpoint_by_time ON audit.checkpoint USING gist (tstzrange(earliest, latest, '[]'));

-- Subtree hashes, 256 to a tile (C2SP tlog-tiles): tile n of level l holds the roots of the full
-- subtrees of 256^l leaves from index n * 256^(l+1) on.
CREATE TABLE audit.tile (
  level smallint NOT NULL CHECK (level BETWEEN 0 AND 7),
  n bigint NOT NULL CHECK (n >= 0),
  hashes bytea NOT NULL CHECK (octet_length(hashes) BETWEEN 32 AND 8192
                               AND octet_length(hashes) % 32 = 0),
  PRIMARY KEY (level, n)
);
ALTER TABLE audit.tile ALTER COLUMN hashes SET STORAGE EXTERNAL;  -- hashes do not compress

-- Why the log went on somewhere else: another server, or a server that was put back.
CREATE TABLE audit.epoch (
  epoch integer PRIMARY KEY,
  size bigint NOT NULL,            -- of the tree when it began
  floor_seq bigint NOT NULL,
  xid xid8 NOT NULL DEFAULT pg_current_xact_id(),  -- in a restored row, not what wrote it
  started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  reason text NOT NULL,
  lost_size bigint,                -- what had been signed and is gone: size and root
  lost_root bytea
);
INSERT INTO audit.epoch (epoch, size, floor_seq, reason) VALUES (1, 0, 0, 'installed');

-- The moment between two events: nobody writes one, later ones have larger numbers and come from
-- transactions above `before_xid`. Waits for writers in their transactions, and they for it; so only
-- where another server counted the transactions of this epoch (storage/sealing.py says how it shows).
CREATE FUNCTION audit.cut(OUT last_seq bigint, OUT before_xid xid8)
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  IF NOT EXISTS (
    SELECT FROM audit.log l JOIN audit.epoch e ON e.epoch = l.epoch
    WHERE l.last_xid >= pg_snapshot_xmin(pg_current_snapshot())
      OR e.xmin::text::numeric <> mod(e.xid::text::numeric, 4294967296)
  ) THEN
    RAISE EXCEPTION 'nothing to cut: this server counted the transactions of this epoch'
      USING ERRCODE = '42501';
  END IF;
  LOCK TABLE audit.event IN SHARE MODE;
  last_seq := (SELECT CASE WHEN s.is_called THEN s.last_value ELSE 0 END FROM audit.event_seq_seq s);
  before_xid := (pg_snapshot_xmin(pg_current_snapshot())::text::numeric - 1)::text::xid8;
END $$;
REVOKE ALL ON FUNCTION audit.cut() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit.cut() TO syncward_sealer;

-- This server may itself be a restored one, whose older events have numbers it has not reached.
DO $$ BEGIN
  UPDATE audit.log SET last_xid = e.xid
  FROM (SELECT xid FROM audit.event WHERE xid > pg_current_xact_id() LIMIT 1) AS e;
  IF FOUND THEN
    UPDATE audit.log SET left_over = true, floor_seq = cut.last_seq, last_xid = cut.before_xid
    FROM audit.cut() cut;
  END IF;
END $$;

-- Rewritten several times a second: cleaned by count, not by share.
ALTER TABLE audit.tile SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
  toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 10000);

CREATE FUNCTION audit.keep_as_written(kept regclass) RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  EXECUTE format('CREATE TRIGGER no_change BEFORE UPDATE OR DELETE ON %s
    FOR EACH ROW EXECUTE FUNCTION audit.deny()', kept);
  EXECUTE format('CREATE TRIGGER no_truncate BEFORE TRUNCATE ON %s
    FOR EACH STATEMENT EXECUTE FUNCTION audit.deny()', kept);
  EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER no_change', kept);
  EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER no_truncate', kept);
END $$;
REVOKE ALL ON FUNCTION audit.keep_as_written(regclass) FROM PUBLIC;
SELECT audit.keep_as_written('audit.checkpoint');
SELECT audit.keep_as_written('audit.epoch');

-- What even the sealer's login may not do with the position: go where no transaction is yet, which
-- would look like a restore, or leave events behind another cut, unless an epoch of this transaction
-- says so. Whoever may remove the trigger needs no leave.
CREATE FUNCTION audit.only_forward() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  IF pg_has_role(current_user, 'syncward_owner', 'MEMBER') THEN RETURN NEW; END IF;
  IF NEW.last_xid <> OLD.last_xid AND NEW.last_xid >= pg_snapshot_xmin(pg_current_snapshot()) THEN
    RAISE EXCEPTION 'the log is not sealed up to transactions that have not ended'
      USING ERRCODE = '42501';
  END IF;
  IF ((NEW.epoch, NEW.floor_seq) <> (OLD.epoch, OLD.floor_seq) OR NEW.left_over AND NOT OLD.left_over)
    AND NOT EXISTS (SELECT FROM audit.epoch e
      WHERE e.epoch = NEW.epoch AND e.floor_seq = NEW.floor_seq AND e.xid = pg_current_xact_id())
  THEN
    RAISE EXCEPTION 'no epoch of this transaction says why the log goes on elsewhere'
      USING ERRCODE = '42501';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER only_forward BEFORE UPDATE ON audit.log
  FOR EACH ROW EXECUTE FUNCTION audit.only_forward();

-- An epoch has its event, in the same transaction.
CREATE FUNCTION audit.require_epoch_event() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  IF NOT EXISTS (
    SELECT FROM audit.event
    WHERE xid = pg_current_xact_id() AND target_id = '00000000-0000-0000-0000-000000000000'
      AND at BETWEEN now() AND clock_timestamp()
      AND CASE WHEN action = 'audit.epoch_started'
        THEN body::jsonb #>> '{detail,epoch}' = NEW.epoch::text END
  ) THEN
    RAISE EXCEPTION 'unaudited epoch' USING ERRCODE = '42501';
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER audited_epoch AFTER INSERT ON audit.epoch
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
  WHEN (NOT pg_has_role(current_user, 'syncward_owner', 'MEMBER'))
  EXECUTE FUNCTION audit.require_epoch_event();
REVOKE ALL ON FUNCTION audit.only_forward(), audit.require_epoch_event() FROM PUBLIC;

-- How far sealing and publishing are behind, for those who may not read events. A few rows of
-- indexes, whatever the size of the log.
CREATE FUNCTION audit.lag(OUT seal_s double precision, OUT publish_s double precision)
  LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog SET enable_seqscan = off
AS $$
DECLARE l audit.log;
BEGIN
  SELECT * INTO l FROM audit.log;
  SELECT extract(epoch FROM clock_timestamp() - min(u.at)) INTO seal_s FROM (
    SELECT e.at FROM audit.event e WHERE e.xid >= l.last_xid
    AND (e.xid > l.last_xid OR e.seq > l.last_seq) AND e.seq > l.floor_seq
    ORDER BY e.xid, e.seq LIMIT 1000) AS u;
  SELECT extract(epoch FROM clock_timestamp() - c.signed_at) INTO publish_s
    FROM audit.checkpoint c WHERE c.size > l.published_size ORDER BY c.size LIMIT 1;
  seal_s := greatest(0, seal_s);
  publish_s := greatest(0, publish_s);
END $$;
REVOKE ALL ON FUNCTION audit.lag() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit.lag()
  TO syncward_scheduler, syncward_operator, syncward_sealer, syncward_auditor;

GRANT SELECT ON alembic_version TO syncward_sealer, syncward_auditor;
GRANT SELECT ON audit.event, audit.log, audit.checkpoint, audit.tile, audit.epoch
  TO syncward_sealer, syncward_auditor, syncward_operator;
GRANT SELECT ON audit.log, audit.epoch TO syncward_scheduler;
GRANT UPDATE (epoch, size, last_xid, last_seq, floor_seq, left_over, left_at, left_seq, sealed_at,
  published_size, published_at, holder, held_until) ON audit.log TO syncward_sealer;
GRANT INSERT ON audit.checkpoint TO syncward_sealer;
GRANT INSERT (epoch, size, floor_seq, reason, lost_size, lost_root) ON audit.epoch
  TO syncward_sealer;
GRANT INSERT, UPDATE ON audit.tile TO syncward_sealer;
GRANT INSERT (account_id, class, action, target_kind, target_id, body) ON audit.event
  TO syncward_sealer, syncward_auditor;
CREATE POLICY append_of_audit ON audit.event FOR INSERT
  TO syncward_sealer, syncward_auditor WITH CHECK (true);
CREATE POLICY audit_reads ON audit.event FOR SELECT
  TO syncward_sealer, syncward_auditor USING (true);
GRANT SELECT (id, name) ON accounts TO syncward_auditor;

-- The same bytes in one call of format() whose plan a session keeps, a quarter of the price of ten
-- functions in SQL; and the same stamp without the price of a definer. Neither asks for a right, and
-- every name in them is qualified and no operator is used, whatever the caller's search_path.
CREATE OR REPLACE FUNCTION audit.leaf(at timestamptz, account_id uuid, class text, action text,
    target_kind text, target_id uuid, login text, client text, body text) RETURNS bytea
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  moment text := pg_catalog.to_char(pg_catalog.timezone('UTC', at), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');
  account text := coalesce(account_id::text, '');
  target text := target_id::text;
BEGIN
  RETURN pg_catalog.sha256(pg_catalog.byteacat('\x00'::bytea, pg_catalog.convert_to(pg_catalog.format(
    '17:syncward/audit/v1,%s:%s,%s:%s,%s:%s,%s:%s,%s:%s,%s:%s,%s:%s,%s:%s,%s:%s,',
    pg_catalog.octet_length(moment), moment, pg_catalog.octet_length(account), account,
    pg_catalog.octet_length(class), class, pg_catalog.octet_length(action), action,
    pg_catalog.octet_length(target_kind), target_kind, pg_catalog.octet_length(target), target,
    pg_catalog.octet_length(login), login, pg_catalog.octet_length(client), client,
    pg_catalog.octet_length(body), body), 'UTF8')));
END $$;

CREATE OR REPLACE FUNCTION audit.stamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.login := session_user;
  NEW.client := coalesce(pg_catalog.host(pg_catalog.inet_client_addr()), 'local');
  NEW.leaf := audit.leaf(NEW.at, NEW.account_id, NEW.class, NEW.action, NEW.target_kind,
    NEW.target_id, NEW.login, NEW.client, NEW.body);
  RETURN NEW;
END $$;
