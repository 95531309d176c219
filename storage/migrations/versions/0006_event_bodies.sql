-- What an event says, version 2: operators by an id behind which the name can be erased, changed values as
-- commitments. Run as syncward_owner. Adds only: the version before this one goes on beside it.

-- ── names of operators, apart from what they did ───────────────────────────────────────────
-- The commitment that an event carries: nobody can put another name behind it, and without name and
-- salt it says nothing.
CREATE FUNCTION audit.principal_id(kind text, name text, salt bytea) RETURNS text
  LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
  RETURN left(encode(sha256(audit.field('syncward/principal/v1')
    || convert_to(octet_length(salt)::text || ':', 'UTF8') || salt || convert_to(',', 'UTF8')
    || audit.field(kind) || audit.field(name)), 'hex'), 32);

CREATE TABLE audit.principal (
  id text PRIMARY KEY,
  kind text NOT NULL,
  name text CHECK (octet_length(name) <= 1024),
  salt bytea CHECK (octet_length(salt) = 32),
  first_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
  erased_at timestamptz,
  CHECK ((name IS NULL) = (salt IS NULL) AND (name IS NULL) = (erased_at IS NOT NULL)),
  CHECK (name IS NULL OR id = audit.principal_id(kind, name, salt))
);

-- 32 bytes that nobody can guess: three random UUIDs hold 366 random bits.
CREATE FUNCTION audit.random_key() RETURNS bytea
  LANGUAGE sql VOLATILE SET search_path = pg_catalog
  RETURN sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
    || uuid_send(gen_random_uuid()));

CREATE INDEX principal_by_name ON audit.principal (kind, name);

-- The id of an operator; made when the name is first seen. Two transactions that see it first wait for
-- each other for a moment only: one that stays open does not hold the other up, which then makes an
-- id of its own. Both mean the name.
CREATE FUNCTION audit.principal_of(of_kind text, of_name text) RETURNS text
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  known text;
  salt bytea := audit.random_key();
  mine boolean := false;
BEGIN
  IF octet_length(of_name) > 1024 THEN
    RAISE EXCEPTION 'the name of an operator is longer than 1024 bytes' USING ERRCODE = '22001';
  END IF;
  FOR attempt IN 1..20 LOOP
    SELECT p.id INTO known FROM audit.principal p WHERE p.kind = of_kind AND p.name = of_name
      ORDER BY p.first_seen, p.id LIMIT 1;
    IF FOUND THEN RETURN known; END IF;
    EXIT WHEN mine;
    mine := pg_try_advisory_xact_lock(hashtextextended('syncward.principal ' || of_kind || of_name, 0));
    IF NOT mine THEN PERFORM pg_sleep(0.05); END IF;  -- got it: look again, then make one
  END LOOP;
  known := audit.principal_id(of_kind, of_name, salt);
  INSERT INTO audit.principal (id, kind, name, salt) VALUES (known, of_kind, of_name, salt);
  RETURN known;
END $$;

-- A name may go, nothing else may change.
CREATE FUNCTION audit.only_erase() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  IF TG_OP = 'UPDATE' AND NEW.name IS NULL AND NEW.salt IS NULL AND OLD.name IS NOT NULL
    AND (NEW.id, NEW.kind, NEW.first_seen) = (OLD.id, OLD.kind, OLD.first_seen)
  THEN
    NEW.erased_at := clock_timestamp();
    RETURN NEW;
  END IF;
  RAISE EXCEPTION 'names behind the audit log can only be erased (%)', TG_OP USING ERRCODE = '42501';
END $$;
CREATE TRIGGER no_change BEFORE UPDATE OR DELETE ON audit.principal
  FOR EACH ROW EXECUTE FUNCTION audit.only_erase();
ALTER TABLE audit.principal ENABLE ALWAYS TRIGGER no_change;
DO $$ BEGIN
  CREATE TRIGGER no_truncate BEFORE TRUNCATE ON audit.principal
    FOR EACH STATEMENT EXECUTE FUNCTION audit.deny();
END $$;
ALTER TABLE audit.principal ENABLE ALWAYS TRIGGER no_truncate;

-- And an event of the same transaction must say so.
CREATE FUNCTION audit.require_erasure() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  IF NOT EXISTS (
    SELECT FROM audit.event
    WHERE xid = pg_current_xact_id() AND target_id = '00000000-0000-0000-0000-000000000000'
      AND at BETWEEN now() AND clock_timestamp()
      AND CASE WHEN action = 'subject.erased'
        THEN body::jsonb #>> '{detail,principal}' = OLD.id
          AND body::jsonb ->> 'principal' <> 'operator:' || OLD.id END
  ) THEN
    RAISE EXCEPTION 'unaudited erasure of a name' USING ERRCODE = '42501';
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER audited_erasure AFTER UPDATE ON audit.principal
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION audit.require_erasure();

CREATE FUNCTION audit.erase_name(of_kind text, of_name text) RETURNS SETOF text
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE audit.principal SET name = NULL, salt = NULL
    WHERE kind = of_kind AND name = of_name RETURNING id $$;

-- ── keys of commitments: what a field was before and after ─────────────────────────────────
-- One for each account; it goes with the account, and then nobody can compare any more.
CREATE TABLE audit.commitment_key (
  account_id uuid PRIMARY KEY REFERENCES accounts (id) ON DELETE CASCADE,
  key bytea NOT NULL CHECK (octet_length(key) = 32)
);

CREATE FUNCTION audit.commitment_key_of(account uuid) RETURNS bytea
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  known bytea;
BEGIN
  LOOP
    SELECT k.key INTO known FROM audit.commitment_key k WHERE k.account_id = account;
    IF FOUND THEN RETURN known; END IF;
    INSERT INTO audit.commitment_key VALUES (account, audit.random_key()) ON CONFLICT DO NOTHING;
  END LOOP;
END $$;

-- ── as before, with bodies of version 2 ────────────────────────────────────────────────────
CREATE OR REPLACE FUNCTION credentials_of_keys(key_ids uuid[], principal text)
  RETURNS TABLE (resource_id uuid, field text, version integer, account_id uuid, envelope bytea,
                 dek_id uuid)
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
#variable_conflict use_column
DECLARE
  one record;
BEGIN
  FOR one IN
    SELECT c.resource_id, c.field, c.version, c.account_id, c.envelope,
      public.key_of(c.envelope) AS dek_id
    FROM public.credentials c
    WHERE substr(c.envelope, 5, 16) IN (
      SELECT uuid_send(k) FROM unnest(key_ids) AS k
      WHERE NOT EXISTS (SELECT FROM keystore.dek d WHERE d.id = k AND d.state <> 'decrypt_only'))
  LOOP
    INSERT INTO audit.event (account_id, class, action, target_kind, target_id, body)
    VALUES (one.account_id, 'A', 'credential.unsealed', 'resource', one.resource_id, format(
      '{"detail":{"fields":%s,"versions":"%s"},"outcome":"attempted","principal":%s,"reason":"reseal","v":2}',
      to_json(one.field), one.version, to_json(principal)));
    resource_id := one.resource_id;
    field := one.field;
    version := one.version;
    account_id := one.account_id;
    envelope := one.envelope;
    dek_id := one.dek_id;
    RETURN NEXT;
  END LOOP;
END $$;

REVOKE ALL ON FUNCTION audit.principal_id(text, text, bytea), audit.random_key(),
  audit.principal_of(text, text), audit.only_erase(), audit.require_erasure(),
  audit.erase_name(text, text), audit.commitment_key_of(uuid) FROM PUBLIC;
GRANT SELECT ON audit.principal TO syncward_auditor, syncward_operator;
GRANT EXECUTE ON FUNCTION audit.principal_of(text, text) TO syncward_operator, syncward_auditor;
GRANT EXECUTE ON FUNCTION audit.erase_name(text, text), audit.commitment_key_of(uuid)
  TO syncward_operator;
