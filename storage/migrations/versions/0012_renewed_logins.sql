-- Logins that workers renew: a token that ends, a refresh token that changes with each use. Run as
-- syncward_owner. Adds only: the version before renews none.
-- Lock order: the resource, then as everywhere: schedules, leases, active_runs, account_queues.

-- Stored by a worker. What a person has stored is kept: a document that still holds it is no change.
ALTER TABLE credentials ADD COLUMN renewed boolean NOT NULL DEFAULT false;
-- Where it was to be sent when it was stored (a digest). Workers send it nowhere else: nobody who may
-- change a resource's settings may change this, or read an envelope to store it again. NULL: stored by
-- the version before.
ALTER TABLE credentials ADD COLUMN aim bytea;

-- As sealed_credentials, with the aim.
CREATE FUNCTION aimed_credentials(for_run uuid, lease uuid)
  RETURNS TABLE (resource_id uuid, field text, version integer, envelope bytea,
                 dek_id uuid, root_id uuid, wrapped bytea, aim bytea)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT s.*, c.aim FROM public.sealed_credentials(for_run, lease) s
    JOIN public.credentials c ON c.resource_id = s.resource_id AND c.field = s.field
      AND c.version = s.version $$;

-- The other system does not take them any more; a person must authorise again.
CREATE TABLE dead_logins (
  resource_id uuid PRIMARY KEY,
  account_id uuid NOT NULL,
  run_id uuid NOT NULL,  -- that met it first
  versions jsonb NOT NULL,  -- of the secrets that were refused, by field
  since timestamptz NOT NULL DEFAULT now(),
  FOREIGN KEY (account_id, resource_id) REFERENCES resources (account_id, id) ON DELETE CASCADE
);
SELECT audit.guard_table('dead_logins', 'resource_id');
ALTER TABLE dead_logins ENABLE ROW LEVEL SECURITY;
ALTER TABLE dead_logins FORCE ROW LEVEL SECURITY;
CREATE POLICY owner_all ON dead_logins TO syncward_owner USING (true) WITH CHECK (true);
CREATE POLICY account_only ON dead_logins TO syncward_worker, syncward_operator
  USING (account_id = current_account()) WITH CHECK (account_id = current_account());
CREATE POLICY operator_across ON dead_logins FOR SELECT TO syncward_operator
  USING (current_setting('syncward.across_accounts', true) = 'on');
GRANT SELECT ON dead_logins TO syncward_worker, syncward_operator;

-- Whether this lease lives and its run is about this resource. Only for the functions below.
CREATE FUNCTION runs_with(for_run uuid, lease uuid, of_resource uuid) RETURNS uuid
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT a.account_id FROM public.active_runs a
    JOIN public.leases l ON l.run_id = a.run_id AND l.token = a.lease_token
    WHERE a.run_id = for_run AND l.token = lease AND a.state = 'running'
      AND l.expires_at > clock_timestamp() AND of_resource IN (a.source_id, a.destination_id) $$;

-- Until the transaction ends nobody else renews this login or stores a secret of it. What the secrets
-- are is asked after this, in a statement of its own.
CREATE FUNCTION lock_login(for_run uuid, lease uuid, of_resource uuid)
  RETURNS TABLE (held boolean, dead jsonb)
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  held := public.runs_with(for_run, lease, of_resource) IS NOT NULL;
  IF held THEN
    PERFORM FROM public.resources r WHERE r.id = of_resource FOR NO KEY UPDATE;
    SELECT d.versions INTO dead FROM public.dead_logins d WHERE d.resource_id = of_resource;
  END IF;
  RETURN NEXT;
END $$;

-- Keep the next version of one field that connectors renew, the one before it and what people stored, but
-- no codes; returns the data keys of those that went, NULL if the lease is gone.
CREATE FUNCTION store_renewed(for_run uuid, lease uuid, of_resource uuid, of_field text,
    of_version integer, new_envelope bytea, new_fingerprint bytea, is_short boolean, its_aim bytea)
  RETURNS uuid[]
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  of_account uuid := public.runs_with(for_run, lease, of_resource);
  superseded uuid[];
BEGIN
  IF of_field NOT IN ('access_token', 'refresh_token', 'authorization', 'config') THEN
    RAISE EXCEPTION 'no worker stores this field' USING ERRCODE = '42501';
  END IF;
  IF of_account IS NULL THEN
    RETURN NULL;
  END IF;
  IF of_version <> 1 + coalesce((SELECT max(c.version) FROM public.credentials c
      WHERE c.resource_id = of_resource AND c.field = of_field), 0) THEN
    RAISE EXCEPTION 'another version was stored meanwhile' USING ERRCODE = '40001';
  END IF;
  INSERT INTO public.credentials
    (resource_id, field, version, account_id, envelope, fingerprint, short, renewed, aim)
  VALUES (of_resource, of_field, of_version, of_account, new_envelope, new_fingerprint, is_short,
    true, its_aim);
  WITH gone AS (
    DELETE FROM public.credentials c WHERE c.resource_id = of_resource AND c.field = of_field
      AND (c.renewed OR of_field = 'authorization') AND c.version < of_version - 1 RETURNING public.key_of(c.envelope) AS key)
  SELECT coalesce(array_agg(g.key) FILTER (WHERE g.key IS NOT NULL), '{}') INTO superseded
    FROM gone g;
  RETURN superseded;
END $$;

-- The other system refuses these versions. Pauses what would meet it; NULL if the lease is gone.
CREATE FUNCTION login_died(for_run uuid, lease uuid, of_resource uuid, refused jsonb,
    OUT first boolean, OUT paused uuid[])
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
  of_account uuid := public.runs_with(for_run, lease, of_resource);
BEGIN
  IF of_account IS NULL THEN
    RETURN;
  END IF;
  PERFORM FROM public.schedules s WHERE of_resource IN (s.source_id, s.destination_id)
    ORDER BY s.connection_id FOR NO KEY UPDATE;
  INSERT INTO public.dead_logins AS d (resource_id, account_id, run_id, versions)
  VALUES (of_resource, of_account, for_run, refused)
  ON CONFLICT (resource_id) DO UPDATE SET versions = excluded.versions
  RETURNING d.xmax = 0 INTO first;
  WITH stopped AS (
    UPDATE public.schedules s SET state = 'paused', state_reason = 'needs_reauth'
    WHERE of_resource IN (s.source_id, s.destination_id) AND s.state = 'active'
    RETURNING s.connection_id)
  SELECT coalesce(array_agg(t.connection_id), '{}') INTO paused FROM stopped t;
END $$;

-- Something new is stored for a dead login: what was paused for it goes on, and nothing else does.
-- The caller has entered the account and holds the resource's lock.
CREATE FUNCTION revive_login(of_resource uuid) RETURNS SETOF uuid
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM public.dead_logins d WHERE d.resource_id = of_resource
                 AND d.account_id = public.current_account()) THEN
    RETURN;
  END IF;
  PERFORM FROM public.schedules s WHERE of_resource IN (s.source_id, s.destination_id)
    ORDER BY s.connection_id FOR NO KEY UPDATE;
  DELETE FROM public.dead_logins d WHERE d.resource_id = of_resource;
  RETURN QUERY UPDATE public.schedules s SET state = 'active', state_reason = NULL, failures = 0,
      anchor_at = now(), next_due_at = CASE WHEN s.kind <> 'manual' THEN now() END
    WHERE of_resource IN (s.source_id, s.destination_id)
      AND s.state = 'paused' AND s.state_reason = 'needs_reauth'
      AND NOT EXISTS (SELECT FROM public.dead_logins o
                      WHERE o.resource_id IN (s.source_id, s.destination_id))
    RETURNING s.connection_id;
  UPDATE public.account_queues q SET at_cap = false, woken = q.woken + 1, has_work = true
    WHERE q.account_id = public.current_account();
END $$;

-- The same for the worker that has just stored it.
CREATE FUNCTION login_renewed(for_run uuid, lease uuid, of_resource uuid) RETURNS SETOF uuid
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT public.revive_login(of_resource)
    WHERE public.runs_with(for_run, lease, of_resource) = public.current_account() $$;

REVOKE ALL ON FUNCTION aimed_credentials(uuid, uuid), runs_with(uuid, uuid, uuid),
  lock_login(uuid, uuid, uuid),
  store_renewed(uuid, uuid, uuid, text, integer, bytea, bytea, boolean, bytea),
  login_died(uuid, uuid, uuid, jsonb), revive_login(uuid), login_renewed(uuid, uuid, uuid)
  FROM PUBLIC;
GRANT EXECUTE ON FUNCTION aimed_credentials(uuid, uuid), lock_login(uuid, uuid, uuid),
  store_renewed(uuid, uuid, uuid, text, integer, bytea, bytea, boolean, bytea),
  login_died(uuid, uuid, uuid, jsonb), login_renewed(uuid, uuid, uuid) TO syncward_worker;
GRANT EXECUTE ON FUNCTION revive_login(uuid) TO syncward_operator;
