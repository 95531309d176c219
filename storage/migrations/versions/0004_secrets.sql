-- Sealed records, keys that rotate. Run as syncward_owner, after ../keystore.sql. Adds only: the version
-- before this one goes on working beside it.

SELECT audit.guard_table('keystore.root', 'id');

-- Lines and documents are sealed; those of the version before stay readable until they expire.
ALTER TABLE run_logs ADD COLUMN envelope bytea;
ALTER TABLE run_logs ALTER COLUMN message DROP NOT NULL;
ALTER TABLE run_outputs ADD COLUMN envelope bytea;
ALTER TABLE run_outputs ALTER COLUMN document DROP NOT NULL;

-- Too short to be looked for in texts: doctor names its resource.
ALTER TABLE credentials ADD COLUMN short boolean NOT NULL DEFAULT false;
GRANT SELECT (short) ON credentials TO syncward_operator;
CREATE INDEX credentials_by_key ON credentials (substr(envelope, 5, 16));

-- An envelope may be replaced under a new data key, and then somebody must have said so.
CREATE CONSTRAINT TRIGGER audited_envelope AFTER UPDATE OF envelope ON credentials
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.envelope IS DISTINCT FROM NEW.envelope)
  EXECUTE FUNCTION audit.require_event('resource_id');

-- The roots that a worker holds: a new one becomes active when all of them do.
ALTER TABLE workers ADD COLUMN roots uuid[] NOT NULL DEFAULT '{}';

-- The data key that an envelope names; NULL for bytes that are too short to be one.
CREATE FUNCTION key_of(envelope bytea) RETURNS uuid
  LANGUAGE sql IMMUTABLE
  RETURN CASE WHEN octet_length(envelope) >= 20
    THEN encode(substr(envelope, 5, 16), 'hex')::uuid END;

-- As before, but the wrapped key may live in a database of its own; it is then looked up there.
CREATE OR REPLACE FUNCTION sealed_credentials(for_run uuid, lease uuid)
  RETURNS TABLE (resource_id uuid, field text, version integer, envelope bytea,
                 dek_id uuid, root_id uuid, wrapped bytea)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog
  BEGIN ATOMIC
    SELECT c.resource_id, c.field, c.version, c.envelope, public.key_of(c.envelope), d.root_id,
      d.wrapped
    FROM public.active_runs a
    JOIN public.leases l ON l.run_id = a.run_id AND l.token = a.lease_token
    JOIN public.credentials c ON c.account_id = a.account_id
      AND c.resource_id IN (a.source_id, a.destination_id)
    LEFT JOIN keystore.dek d ON d.account_id = c.account_id AND d.id = public.key_of(c.envelope)
    WHERE a.run_id = for_run AND l.token = lease AND a.state = 'running'
      AND l.expires_at > clock_timestamp()
      AND c.version = (SELECT max(n.version) FROM public.credentials n
                       WHERE n.resource_id = c.resource_id AND n.field = c.field);
  END;

-- ── re-sealing under a new data key: whatever is sealed with these keys ────────────────────
-- Only of keys that are to be replaced, and each row that leaves has its event here: no lease guards it.
CREATE FUNCTION credentials_of_keys(key_ids uuid[], principal text)
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
      '{"detail":{"fields":%s,"versions":"%s"},"outcome":"attempted","principal":%s,"reason":"reseal","v":1}',
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

-- Which of these keys something is sealed with.
CREATE FUNCTION keys_in_use(key_ids uuid[]) RETURNS SETOF uuid
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT public.key_of(c.envelope) FROM public.credentials c
    WHERE substr(c.envelope, 5, 16) IN (SELECT uuid_send(k) FROM unnest(key_ids) AS k) $$;

CREATE FUNCTION reseal_credential(of_resource uuid, of_field text, of_version integer,
    old bytea, new bytea) RETURNS boolean
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  UPDATE public.credentials SET envelope = new
  WHERE resource_id = of_resource AND field = of_field AND version = of_version AND envelope = old;
  RETURN FOUND;
END $$;

-- The data keys of a resource, so that they can be shredded with it.
CREATE FUNCTION credential_key_ids(of_resource uuid) RETURNS SETOF uuid
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT public.key_of(envelope) FROM public.credentials
    WHERE resource_id = of_resource AND octet_length(envelope) >= 20 $$;

-- Credentials in use that are not what their newest event says was stored: somebody put an older row
-- back, or another one. As many as are asked for, chosen at random.
CREATE FUNCTION credentials_unlike_events(most integer)
  RETURNS TABLE (account text, resource text, field text)
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT a.name, r.name, c.field
    FROM (SELECT * FROM (SELECT DISTINCT ON (n.resource_id, n.field) n.* FROM public.credentials n
            ORDER BY n.resource_id, n.field, n.version DESC) AS newest
          ORDER BY random() LIMIT most) AS c
    JOIN public.resources r ON r.id = c.resource_id
    JOIN public.accounts a ON a.id = c.account_id
    JOIN LATERAL (
      SELECT e.body::jsonb -> 'detail' AS said FROM audit.event e
      WHERE e.target_id = c.resource_id
        AND e.action IN ('credential.sealed', 'credential.resealed')
        AND e.body::jsonb -> 'detail' ->> 'field' = c.field
      ORDER BY e.at DESC, e.seq DESC LIMIT 1) AS e ON true
    WHERE e.said ? 'digest' AND (e.said ->> 'digest' <> encode(sha256(c.envelope), 'hex')
      OR (e.said ->> 'version')::integer <> c.version)
    ORDER BY 1, 2, 3 $$;

REVOKE ALL ON FUNCTION credentials_of_keys(uuid[], text), keys_in_use(uuid[]),
  credentials_unlike_events(integer),
  credential_key_ids(uuid),
  reseal_credential(uuid, text, integer, bytea, bytea) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION credentials_of_keys(uuid[], text), keys_in_use(uuid[]),
  reseal_credential(uuid, text, integer, bytea, bytea) TO syncward_worker;
GRANT EXECUTE ON FUNCTION credential_key_ids(uuid), credentials_unlike_events(integer)
  TO syncward_operator;
