-- The keystore: wrapped data keys and the roots that wrap them. Run as syncward_owner, in the control
-- database and, where SYNCWARD_KEYSTORE_URL says so, in a database of its own. Idempotent: a later
-- version runs it again. Everything goes through the functions below, which give each process the
-- half that is its own: workers see wrapped keys of credentials, operators those of records.

CREATE TABLE IF NOT EXISTS keystore.dek (
  id uuid PRIMARY KEY,
  account_id uuid NOT NULL,
  purpose text NOT NULL CHECK (purpose IN ('credentials', 'records')),
  root_id uuid NOT NULL,
  wrapped bytea NOT NULL,
  state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'decrypt_only')),
  created_at timestamptz NOT NULL DEFAULT now()
);
-- Records keys are of one month; a credential's key that nothing is sealed with any more waits until
-- no backup needs it.
ALTER TABLE keystore.dek ADD COLUMN IF NOT EXISTS month date;
ALTER TABLE keystore.dek ADD COLUMN IF NOT EXISTS unused_since timestamptz;
CREATE INDEX IF NOT EXISTS dek_by_root ON keystore.dek (purpose, root_id, id);
CREATE INDEX IF NOT EXISTS dek_by_account ON keystore.dek (account_id);
CREATE INDEX IF NOT EXISTS dek_replaced ON keystore.dek (id) WHERE state = 'decrypt_only' AND unused_since IS NULL;
CREATE INDEX IF NOT EXISTS dek_by_month ON keystore.dek (month) WHERE month IS NOT NULL;
ALTER TABLE keystore.dek ENABLE ROW LEVEL SECURITY;
ALTER TABLE keystore.dek FORCE ROW LEVEL SECURITY;
DO $$ BEGIN
  CREATE POLICY owner_all ON keystore.dek TO syncward_owner USING (true) WITH CHECK (true);
EXCEPTION WHEN duplicate_object THEN NULL; END $$;

-- next: distributed, not used yet. active: wraps. decrypt_only: only opens. retired: opens nothing.
CREATE TABLE IF NOT EXISTS keystore.root (
  id uuid PRIMARY KEY,
  purpose text NOT NULL CHECK (purpose IN ('credentials', 'records')),
  provider text NOT NULL,
  state text NOT NULL CHECK (state IN ('next', 'active', 'decrypt_only', 'retired')),
  canary bytea NOT NULL,  -- whoever holds the root opens it: right database, right keyring
  created_at timestamptz NOT NULL DEFAULT now(),
  activated_at timestamptz,
  unused_since timestamptz  -- when its last data key was wrapped by another root
);
CREATE UNIQUE INDEX IF NOT EXISTS root_active ON keystore.root (purpose) WHERE state = 'active';

-- ── data keys ──────────────────────────────────────────────────────────────────────────────
-- Keep a key before anything is sealed with it; the same one again is no error. False: its root is
-- retired or unknown here.
CREATE OR REPLACE FUNCTION keystore.put_key(key_id uuid, of_account uuid, for_purpose text,
    by_root uuid, blob bytea, of_month date) RETURNS boolean
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM keystore.root r
                 WHERE r.id = by_root AND r.purpose = for_purpose AND r.state <> 'retired') THEN
    RETURN false;
  END IF;
  UPDATE keystore.root SET unused_since = NULL WHERE id = by_root AND unused_since IS NOT NULL;
  INSERT INTO keystore.dek (id, account_id, purpose, root_id, wrapped, month)
  VALUES (key_id, of_account, for_purpose, by_root, blob, of_month) ON CONFLICT (id) DO NOTHING;
  RETURN true;
END $$;

CREATE OR REPLACE FUNCTION keystore.credential_keys(key_ids uuid[])
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT d.id, d.account_id, d.root_id, d.wrapped FROM keystore.dek d
    WHERE d.id = ANY (key_ids) AND d.purpose = 'credentials' $$;

CREATE OR REPLACE FUNCTION keystore.records_keys(key_ids uuid[])
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT d.id, d.account_id, d.root_id, d.wrapped FROM keystore.dek d
    WHERE d.id = ANY (key_ids) AND d.purpose = 'records' $$;

-- ── rotation: keys that another root than the active one wraps ─────────────────────────────
CREATE OR REPLACE FUNCTION keystore.stale_credential_keys(by_roots uuid[], batch integer)
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT d.id, d.account_id, d.root_id, d.wrapped FROM keystore.dek d
    WHERE d.purpose = 'credentials' AND d.root_id = ANY (by_roots)
    LIMIT batch FOR NO KEY UPDATE SKIP LOCKED $$;

CREATE OR REPLACE FUNCTION keystore.stale_records_keys(by_roots uuid[], batch integer)
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT d.id, d.account_id, d.root_id, d.wrapped FROM keystore.dek d
    WHERE d.purpose = 'records' AND d.root_id = ANY (by_roots)
    LIMIT batch FOR NO KEY UPDATE SKIP LOCKED $$;

-- Compare and set: a key that changed meanwhile stays as it is.
CREATE OR REPLACE FUNCTION keystore.rewrap(key_ids uuid[], old bytea[], new bytea[], to_root uuid)
  RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH changed AS (
      UPDATE keystore.dek d SET wrapped = n.new, root_id = to_root
      FROM unnest(key_ids, old, new) AS n (id, old, new), keystore.root r
      WHERE d.id = n.id AND d.wrapped = n.old AND r.id = to_root AND r.state = 'active'
        AND r.purpose = d.purpose RETURNING 1)
    SELECT count(*) FROM changed $$;

-- ── data keys that are replaced: nothing new is sealed with them ───────────────────────────
CREATE OR REPLACE FUNCTION keystore.replace_keys(of_account uuid) RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH changed AS (
      UPDATE keystore.dek SET state = 'decrypt_only'
      WHERE purpose = 'credentials' AND state = 'active'
        AND (of_account IS NULL OR account_id = of_account) RETURNING 1)
    SELECT count(*) FROM changed $$;

-- Locked until the caller has sealed again what they sealed; others skip them meanwhile.
CREATE OR REPLACE FUNCTION keystore.keys_to_replace(except_ids uuid[], batch integer)
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT d.id, d.account_id, d.root_id, d.wrapped FROM keystore.dek d
    WHERE d.state = 'decrypt_only' AND d.unused_since IS NULL AND NOT d.id = ANY (except_ids)
    ORDER BY d.id LIMIT batch FOR NO KEY UPDATE SKIP LOCKED $$;

CREATE OR REPLACE FUNCTION keystore.mark_unused(key_ids uuid[]) RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH changed AS (
      UPDATE keystore.dek SET unused_since = now()
      WHERE id = ANY (key_ids) AND state = 'decrypt_only' AND unused_since IS NULL RETURNING 1)
    SELECT count(*) FROM changed $$;

-- Forget keys that no backup needs any more, and those of months whose records are gone.
CREATE OR REPLACE FUNCTION keystore.forget_keys(unused_before timestamptz, months_before date)
  RETURNS bigint
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  gone bigint;
BEGIN
  IF months_before > now() - interval '2 months' OR unused_before > now() - interval '1 day' THEN
    RAISE EXCEPTION 'keys are kept longer than that' USING ERRCODE = '22023';
  END IF;
  WITH deleted AS (
    DELETE FROM keystore.dek
    WHERE (state = 'decrypt_only' AND unused_since < unused_before) OR month < months_before
    RETURNING 1)
  SELECT count(*) INTO gone FROM deleted;
  RETURN gone;
END $$;

-- ── shredding ──────────────────────────────────────────────────────────────────────────────
CREATE OR REPLACE FUNCTION keystore.shred_account(of_account uuid) RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH deleted AS (DELETE FROM keystore.dek WHERE account_id = of_account RETURNING 1)
    SELECT count(*) FROM deleted $$;

CREATE OR REPLACE FUNCTION keystore.shred_keys(key_ids uuid[]) RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH deleted AS (DELETE FROM keystore.dek WHERE id = ANY (key_ids) RETURNING 1)
    SELECT count(*) FROM deleted $$;

-- ── counts, without any key ────────────────────────────────────────────────────────────────
CREATE OR REPLACE FUNCTION keystore.counts()
  RETURNS TABLE (purpose text, root_id uuid, keys bigint, oldest timestamptz)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT purpose, root_id, count(*), min(created_at) FROM keystore.dek GROUP BY 1, 2 $$;

CREATE OR REPLACE FUNCTION keystore.pending(by_roots uuid[])
  RETURNS TABLE (rewrap bigint, replace bigint)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT (SELECT count(*) FROM keystore.dek WHERE purpose = 'credentials'
              AND root_id = ANY (by_roots)),
           (SELECT count(*) FROM keystore.dek WHERE state = 'decrypt_only'
              AND unused_since IS NULL) $$;

-- ── least grants ───────────────────────────────────────────────────────────────────────────
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA keystore FROM PUBLIC;
GRANT EXECUTE ON FUNCTION keystore.put_key(uuid, uuid, text, uuid, bytea, date),
  keystore.rewrap(uuid[], bytea[], bytea[], uuid), keystore.counts(), keystore.pending(uuid[]),
  keystore.shred_keys(uuid[]) TO syncward_worker, syncward_operator;
GRANT EXECUTE ON FUNCTION keystore.credential_keys(uuid[]),
  keystore.stale_credential_keys(uuid[], integer), keystore.keys_to_replace(uuid[], integer),
  keystore.mark_unused(uuid[]), keystore.forget_keys(timestamptz, date) TO syncward_worker;
GRANT EXECUTE ON FUNCTION keystore.records_keys(uuid[]),
  keystore.stale_records_keys(uuid[], integer), keystore.replace_keys(uuid),
  keystore.shred_account(uuid) TO syncward_operator;
GRANT SELECT, INSERT, UPDATE ON keystore.root TO syncward_worker, syncward_operator;
