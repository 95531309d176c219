"""Run syncs. Start at run_sync.py."""
