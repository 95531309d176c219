"""Alembic's entry: run on the connection that storage/migrate.py hands over."""

from alembic import context

from storage.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, include_schemas=True)
context.run_migrations()
