-- Tenants and schedules by the million, by the owner and with triggers off: `accounts` and `each` are set before.
-- Every account has a source and a destination of the connector `noop` and `each` connections.
SET session_replication_role = replica;
CREATE TEMP TABLE made AS
  SELECT g AS n, uuidv7() AS account, uuidv7() AS source, uuidv7() AS destination
  FROM generate_series(1, current_setting('bench.accounts')::int) g;
INSERT INTO accounts (id, name, plan)
  SELECT account, current_setting('bench.prefix') || n, 'unlimited' FROM made;
INSERT INTO account_queues (account_id, runs_max) SELECT account, 1000 FROM made;
INSERT INTO resources (id, account_id, name, kind, config)
  SELECT source, account, 'from', 'noop', '{}'::jsonb FROM made
  UNION ALL SELECT destination, account, 'to', 'noop', '{}'::jsonb FROM made;
INSERT INTO resource_queues (resource_id, runs_max)
  SELECT source, 1000 FROM made UNION ALL SELECT destination, 1000 FROM made;
CREATE TEMP TABLE wired AS
  SELECT uuidv7() AS connection, m.*, g AS k
  FROM made m, generate_series(1, current_setting('bench.each')::int) g;
INSERT INTO connections (id, account_id, name, source_id, destination_id, target_schema)
  SELECT connection, account, 'c' || k, source, destination, 'x' FROM wired;
INSERT INTO streams (connection_id, name, account_id, position, spec)
  SELECT connection, 'public.t', account, 0,
         '{"name": "public.t", "mode": "merge", "key": ["id"], "cursor": "xmin"}'::jsonb FROM wired;
INSERT INTO schedules (connection_id, account_id, source_id, destination_id, kind, interval_s,
                       anchor_at, next_due_at)
  SELECT connection, account, source, destination, 'interval', 3600, now(),
         now() + random() * interval '1 hour' + interval '2 hours' FROM wired;
DROP TABLE made, wired;
SET session_replication_role = origin;
