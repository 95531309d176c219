-- The source table of the benchmarks: 355 bytes a row, twelve types. psql -v n=1000000
CREATE TABLE events (
  id          bigint PRIMARY KEY,
  event_uuid  uuid NOT NULL,
  title       text NOT NULL,               -- ~40 chars
  qty         integer NOT NULL,
  amount      numeric(12,2) NOT NULL,
  is_active   boolean NOT NULL,
  updated_at  timestamptz NOT NULL,
  event_date  date NOT NULL,
  payload     jsonb NOT NULL,              -- ~120 bytes as text
  note        text,                        -- NULL in 2/3 rows
  score       double precision NOT NULL,
  tags        text[] NOT NULL
);
SELECT setseed(0.42);
INSERT INTO events
SELECT g,
       md5(g::text)::uuid,
       'event ' || md5((g*7)::text) || ' x' ,
       (random()*1000000)::int,
       round((random()*99999)::numeric, 2),
       random() < 0.7,
       timestamptz '2026-01-01 00:00:00+00' + g * interval '10 seconds' + (g % 997) * interval '1 millisecond',
       date '2020-01-01' + (g % 2200)::int,
       jsonb_build_object('kind', 'type-' || (g % 17), 'source', substr(md5((g*3)::text),1,16),
                          'count', g % 1000, 'ratio', round((random())::numeric, 4),
                          'ok', g % 2 = 0, 'nested', jsonb_build_object('a', g % 10, 'b', 'v' || g % 100)),
       CASE WHEN g % 3 = 0 THEN 'note for row ' || g END,
       random()*1000,
       ARRAY['t' || g % 10, 'tag-' || g % 50, 'x' || g % 7]
FROM generate_series(1, :n) g;
CREATE INDEX events_updated_at ON events(updated_at);
VACUUM ANALYZE events;
CHECKPOINT;
