"""Real Postgres and Valkey for the demo, development and tests."""
