"""Triggers that only the tests install: every change of a run's state, every commit of rows.

The audit stream says what the program says of itself. These say what the databases saw.
"""

from typing import Any

import psycopg

_CONTROL = """
CREATE SCHEMA recorded;
CREATE TABLE recorded.moves (
  n bigint GENERATED ALWAYS AS IDENTITY, xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
  at timestamptz NOT NULL DEFAULT clock_timestamp(), run_id uuid NOT NULL, subject_id uuid NOT NULL,
  before text, after text);
CREATE FUNCTION recorded.move() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  IF TG_OP = 'DELETE' THEN
    INSERT INTO recorded.moves (run_id, subject_id, before)
    VALUES (OLD.run_id, OLD.subject_id, OLD.state);
  ELSIF TG_OP = 'INSERT' THEN
    INSERT INTO recorded.moves (run_id, subject_id, after)
    VALUES (NEW.run_id, NEW.subject_id, NEW.state);
  ELSIF OLD.state <> NEW.state THEN
    INSERT INTO recorded.moves (run_id, subject_id, before, after)
    VALUES (NEW.run_id, NEW.subject_id, OLD.state, NEW.state);
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER recorded AFTER INSERT OR UPDATE OR DELETE ON active_runs
  FOR EACH ROW EXECUTE FUNCTION recorded.move();
"""
_DESTINATION = """
CREATE SCHEMA recorded;
CREATE TABLE recorded.commits (
  n bigint GENERATED ALWAYS AS IDENTITY, xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
  at timestamptz NOT NULL DEFAULT clock_timestamp(), connection_id uuid NOT NULL,
  stream text NOT NULL, run_id uuid NOT NULL, fence bigint NOT NULL, generation bigint NOT NULL,
  cursor_before jsonb, cursor_from jsonb, cursor_to jsonb);
CREATE FUNCTION recorded.commit_() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  INSERT INTO recorded.commits (connection_id, stream, run_id, fence, generation, cursor_before,
                                cursor_from, cursor_to)
  VALUES (NEW.connection_id, NEW.stream, NEW.run_id, NEW.fence, NEW.generation,
          CASE WHEN OLD.cursor = 'null' THEN NULL ELSE OLD.cursor END,
          nullif(NEW.result -> 'cursor_from', 'null'), NEW.cursor);
  RETURN NULL;
END $$;
CREATE TRIGGER recorded AFTER UPDATE OF generation ON _syncward.state
  FOR EACH ROW EXECUTE FUNCTION recorded.commit_();
"""


def record_moves(control: psycopg.Connection[Any]) -> None:
    """From now on every change of a live run's state is kept, with its transaction."""
    control.execute(_CONTROL)


def record_commits(destination: psycopg.Connection[Any]) -> None:
    """From now on every commit of rows is kept; the state table must be there (one run made it)."""
    destination.execute(_DESTINATION)
