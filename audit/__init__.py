"""Seal the audit log, anchor it, verify it. Start at sealer.py; docs/audit.md is the format."""
