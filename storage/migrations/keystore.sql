-- The keystore: wrapped data keys and the roots that wrap them. Run as syncward_owner, in the control
-- database and, where SYNCWARD_KEYSTORE_URL says so, in a database of its own. Idempotent: a later
-- version runs it again. Everything goes through the functions below, which give each process the
-- half that is its own: workers see wrapped keys of credentials, operators those of records.

CREATE TABLE IF NOT EXISTS keystore.dek (
  id uuid PRIMARY KEY,
  account_id uuid NOT NULL,
  purpose text NOT NULL CHECK (purpose IN ('credentials', 'records', 'pseudonyms')),
  root_id uuid NOT NULL,
  wrapped bytea NOT NULL,
  state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'decrypt_only')),
  created_at timestamptz NOT NULL DEFAULT now()
);
-- Records keys are of one month; a credential's key that nothing is sealed with any more waits until
-- no backup needs it.
ALTER TABLE keystore.dek ADD COLUMN IF NOT EXISTS month date;
ALTER TABLE keystore.dek ADD COLUMN IF NOT EXISTS unused_since timestamptz;
ALTER TABLE keystore.dek ADD COLUMN IF NOT EXISTS taken_until timestamptz;
-- The key of an account's pseudonyms (docs/keys.md): one, wrapped by the root of credentials, never replaced.
DO $$ BEGIN
  IF (SELECT pg_get_constraintdef(oid) !~ 'pseudonyms' FROM pg_constraint
      WHERE conrelid = 'keystore.dek'::regclass AND conname = 'dek_purpose_check') THEN
    ALTER TABLE keystore.dek DROP CONSTRAINT dek_purpose_check,
      ADD CONSTRAINT dek_purpose_check CHECK (purpose IN ('credentials', 'records', 'pseudonyms'));
  END IF;
END $$;
CREATE UNIQUE INDEX IF NOT EXISTS dek_pseudonyms ON keystore.dek (account_id) WHERE purpose = 'pseudonyms';
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

-- What a root is never changes, and its state goes one way: an old root does not come back, whoever asks.
CREATE OR REPLACE FUNCTION keystore.root_moves() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  IF (NEW.id, NEW.purpose, NEW.provider, NEW.canary, NEW.created_at)
      IS DISTINCT FROM (OLD.id, OLD.purpose, OLD.provider, OLD.canary, OLD.created_at)
    OR (OLD.state, NEW.state) NOT IN (('next', 'next'), ('next', 'active'), ('next', 'retired'), ('active', 'active'),
      ('active', 'decrypt_only'), ('decrypt_only', 'decrypt_only'), ('decrypt_only', 'retired'),
      ('retired', 'retired')) THEN
    RAISE EXCEPTION 'a root does not change like that' USING ERRCODE = '42501';
  END IF;
  RETURN NEW;
END $$;
DO $$ BEGIN
  CREATE TRIGGER moves BEFORE UPDATE ON keystore.root
    FOR EACH ROW EXECUTE FUNCTION keystore.root_moves();
EXCEPTION WHEN duplicate_object THEN NULL; END $$;

-- The first root of a purpose is active at once; a later one waits as `next`. False: it, or another
-- one that waits, is there already.
CREATE OR REPLACE FUNCTION keystore.add_root(new_id uuid, for_purpose text, of_provider text, bird bytea)
  RETURNS boolean
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  first boolean;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('syncward.keystore.root'));
  first := NOT EXISTS (SELECT FROM keystore.root r WHERE r.purpose = for_purpose);
  IF EXISTS (SELECT FROM keystore.root r WHERE r.id = new_id
             OR (r.purpose = for_purpose AND r.state = 'next')) THEN
    RETURN false;
  END IF;
  INSERT INTO keystore.root (id, purpose, provider, state, canary, activated_at)
  VALUES (new_id, for_purpose, of_provider, CASE WHEN first THEN 'active' ELSE 'next' END, bird,
          CASE WHEN first THEN now() END);
  RETURN true;
END $$;

-- Returns the root that was active until now.
CREATE OR REPLACE FUNCTION keystore.activate_root(root_id uuid) RETURNS uuid
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  former uuid;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('syncward.keystore.root'));
  UPDATE keystore.root r SET state = 'decrypt_only'
  WHERE r.state = 'active' AND r.id <> root_id
    AND r.purpose = (SELECT n.purpose FROM keystore.root n WHERE n.id = root_id AND n.state = 'next')
  RETURNING r.id INTO former;
  UPDATE keystore.root r SET state = 'active', activated_at = now()
  WHERE r.id = root_id AND r.state = 'next';
  IF NOT FOUND THEN
    RAISE EXCEPTION 'only a root that is next becomes active' USING ERRCODE = '42501';
  END IF;
  RETURN former;
END $$;

-- False while a key is wrapped by it. Nobody can wrap one by it meanwhile: put_key waits for the row.
CREATE OR REPLACE FUNCTION keystore.retire_root(root_id uuid) RETURNS boolean
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  PERFORM FROM keystore.root r WHERE r.id = root_id FOR UPDATE;
  IF EXISTS (SELECT FROM keystore.dek d WHERE d.root_id = retire_root.root_id) THEN
    RETURN false;
  END IF;
  UPDATE keystore.root r SET state = 'retired' WHERE r.id = retire_root.root_id;
  RETURN FOUND;
END $$;

-- Since when no data key is wrapped by it: asked of the keys, rows that somebody holds included.
CREATE OR REPLACE FUNCTION keystore.note_unused(root_id uuid) RETURNS void
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE keystore.root r SET unused_since = now()
    WHERE r.id = note_unused.root_id AND r.unused_since IS NULL AND r.state = 'decrypt_only'
      AND NOT EXISTS (SELECT FROM keystore.dek d WHERE d.root_id = r.id) $$;

-- ── data keys ──────────────────────────────────────────────────────────────────────────────
-- Keep a key before anything is sealed with it; the same one again is no error. False: its root is
-- retired or unknown here.
CREATE OR REPLACE FUNCTION keystore.put_key(key_id uuid, of_account uuid, for_purpose text,
    by_root uuid, blob bytea, of_month date) RETURNS boolean
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  PERFORM FROM keystore.root r
    WHERE r.id = by_root AND r.state <> 'retired'
      AND r.purpose = CASE for_purpose WHEN 'pseudonyms' THEN 'credentials' ELSE for_purpose END
    FOR SHARE;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  UPDATE keystore.root SET unused_since = NULL WHERE id = by_root AND unused_since IS NOT NULL;
  INSERT INTO keystore.dek (id, account_id, purpose, root_id, wrapped, month)
  VALUES (key_id, of_account, for_purpose, by_root, blob, of_month) ON CONFLICT DO NOTHING;
  RETURN true;
END $$;

-- One for an account: `put_key` keeps none where there is one.
CREATE OR REPLACE FUNCTION keystore.pseudonym_key(of_account uuid)
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT d.id, d.account_id, d.root_id, d.wrapped FROM keystore.dek d
    WHERE d.account_id = of_account AND d.purpose = 'pseudonyms' $$;

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
CREATE OR REPLACE FUNCTION keystore.stale_credential_keys(by_roots uuid[], except_ids uuid[], batch integer)
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT d.id, d.account_id, d.root_id, d.wrapped FROM keystore.dek d
    WHERE d.purpose IN ('credentials', 'pseudonyms') AND d.root_id = ANY (by_roots)
      AND NOT d.id = ANY (except_ids)
    LIMIT batch FOR NO KEY UPDATE SKIP LOCKED $$;

CREATE OR REPLACE FUNCTION keystore.stale_records_keys(by_roots uuid[], except_ids uuid[], batch integer)
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT d.id, d.account_id, d.root_id, d.wrapped FROM keystore.dek d
    WHERE d.purpose = 'records' AND d.root_id = ANY (by_roots)
      AND NOT d.id = ANY (except_ids)
    LIMIT batch FOR NO KEY UPDATE SKIP LOCKED $$;

-- Compare and set: a key that changed meanwhile stays as it is, and none goes to a root that is not
-- the active one by now.
CREATE OR REPLACE FUNCTION keystore.rewrap(key_ids uuid[], old bytea[], new bytea[], new_roots uuid[])
  RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH changed AS (
      UPDATE keystore.dek d SET wrapped = n.new, root_id = n.root_id
      FROM unnest(key_ids, old, new, new_roots) AS n (id, old, new, root_id), keystore.root r
      WHERE d.id = n.id AND d.wrapped = n.old AND r.id = n.root_id AND r.state = 'active'
        AND r.purpose = CASE d.purpose WHEN 'pseudonyms' THEN 'credentials' ELSE d.purpose END
      RETURNING 1)
    SELECT count(*) FROM changed $$;

-- ── data keys that are replaced: nothing new is sealed with them ───────────────────────────
CREATE OR REPLACE FUNCTION keystore.replace_keys(of_account uuid) RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH changed AS (
      UPDATE keystore.dek SET state = 'decrypt_only'
      WHERE purpose = 'credentials' AND state = 'active'
        AND (of_account IS NULL OR account_id = of_account) RETURNING 1)
    SELECT count(*) FROM changed $$;

-- Taken for a minute: others leave them alone meanwhile, and go on with them if their taker died.
CREATE OR REPLACE FUNCTION keystore.keys_to_replace(except_ids uuid[], batch integer)
  RETURNS TABLE (id uuid, account_id uuid, root_id uuid, wrapped bytea, young boolean)
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE keystore.dek d SET taken_until = clock_timestamp() + interval '1 min'
    FROM (SELECT k.id FROM keystore.dek k
          WHERE k.state = 'decrypt_only' AND k.unused_since IS NULL
            AND (k.taken_until IS NULL OR k.taken_until < clock_timestamp())
            AND NOT k.id = ANY (except_ids)
          ORDER BY k.id LIMIT batch FOR NO KEY UPDATE SKIP LOCKED) AS chosen
    WHERE d.id = chosen.id
    RETURNING d.id, d.account_id, d.root_id, d.wrapped, d.created_at > now() - interval '15 min' $$;

CREATE OR REPLACE FUNCTION keystore.mark_unused(key_ids uuid[]) RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH changed AS (
      UPDATE keystore.dek SET unused_since = now()
      WHERE id = ANY (key_ids) AND state = 'decrypt_only' AND unused_since IS NULL RETURNING 1)
    SELECT count(*) FROM changed $$;

-- What they sealed is gone, because something newer is there: nothing is to be sealed again.
CREATE OR REPLACE FUNCTION keystore.supersede_keys(key_ids uuid[]) RETURNS void
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE keystore.dek SET state = 'decrypt_only', unused_since = coalesce(unused_since, now())
    WHERE id = ANY (key_ids) AND purpose = 'credentials' $$;

-- Keys that no backup needs, as far as the keystore can tell: whether a restored control database uses
-- one again, its caller must ask there.
CREATE OR REPLACE FUNCTION keystore.forgettable(unused_before timestamptz, batch integer)
  RETURNS SETOF uuid
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT id FROM keystore.dek WHERE state = 'decrypt_only' AND unused_since < unused_before
    ORDER BY id LIMIT batch $$;

-- They are sealed with again, or still: they count as keys to be replaced once more.
CREATE OR REPLACE FUNCTION keystore.used_again(key_ids uuid[]) RETURNS void
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE keystore.dek SET unused_since = NULL WHERE id = ANY (key_ids) $$;

CREATE OR REPLACE FUNCTION keystore.forget_keys(key_ids uuid[], months_before date)
  RETURNS bigint
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  gone bigint;
BEGIN
  IF months_before > now() - interval '2 months' THEN
    RAISE EXCEPTION 'keys are kept longer than that' USING ERRCODE = '22023';
  END IF;
  WITH deleted AS (
    DELETE FROM keystore.dek
    WHERE (id = ANY (key_ids) AND state = 'decrypt_only'
           AND unused_since < now() - interval '1 day')
      OR month < months_before
    RETURNING 1)
  SELECT count(*) INTO gone FROM deleted;
  RETURN gone;
END $$;

-- ── shredding ──────────────────────────────────────────────────────────────────────────────
CREATE OR REPLACE FUNCTION keystore.shred_account(of_account uuid) RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH deleted AS (DELETE FROM keystore.dek WHERE account_id = of_account RETURNING 1)
    SELECT count(*) FROM deleted $$;

CREATE OR REPLACE FUNCTION keystore.shred_keys(of_account uuid, key_ids uuid[]) RETURNS bigint
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH deleted AS (
      DELETE FROM keystore.dek WHERE account_id = of_account AND id = ANY (key_ids)
        AND purpose = 'credentials' RETURNING 1)
    SELECT count(*) FROM deleted $$;

-- ── counts, without any key ────────────────────────────────────────────────────────────────
CREATE OR REPLACE FUNCTION keystore.counts()
  RETURNS TABLE (purpose text, root_id uuid, keys bigint, oldest timestamptz)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT CASE d.purpose WHEN 'pseudonyms' THEN 'credentials' ELSE d.purpose END, d.root_id,
      count(*), min(d.created_at) FROM keystore.dek d GROUP BY 1, 2 $$;

CREATE OR REPLACE FUNCTION keystore.pending(by_roots uuid[])
  RETURNS TABLE (rewrap bigint, replace bigint)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT (SELECT count(*) FROM keystore.dek WHERE purpose IN ('credentials', 'pseudonyms')
              AND root_id = ANY (by_roots)),
           (SELECT count(*) FROM keystore.dek WHERE state = 'decrypt_only'
              AND unused_since IS NULL) $$;

-- ── least grants ───────────────────────────────────────────────────────────────────────────
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA keystore FROM PUBLIC;
GRANT SELECT ON keystore.root TO syncward_worker, syncward_operator;
GRANT EXECUTE ON FUNCTION keystore.add_root(uuid, text, text, bytea), keystore.note_unused(uuid),
  keystore.put_key(uuid, uuid, text, uuid, bytea, date),
  keystore.rewrap(uuid[], bytea[], bytea[], uuid[]), keystore.counts(), keystore.pending(uuid[])
  TO syncward_worker, syncward_operator;
GRANT EXECUTE ON FUNCTION keystore.credential_keys(uuid[]), keystore.pseudonym_key(uuid),
  keystore.stale_credential_keys(uuid[], uuid[], integer),
  keystore.keys_to_replace(uuid[], integer), keystore.mark_unused(uuid[]),
  keystore.forgettable(timestamptz, integer), keystore.used_again(uuid[]),
  keystore.forget_keys(uuid[], date) TO syncward_worker;
GRANT EXECUTE ON FUNCTION keystore.supersede_keys(uuid[]) TO syncward_worker, syncward_operator;
GRANT EXECUTE ON FUNCTION keystore.records_keys(uuid[]),
  keystore.stale_records_keys(uuid[], uuid[], integer), keystore.replace_keys(uuid),
  keystore.activate_root(uuid), keystore.retire_root(uuid), keystore.shred_account(uuid),
  keystore.shred_keys(uuid, uuid[]) TO syncward_operator;
