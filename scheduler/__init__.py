"""Decide what is due, dispatch fairly, reap. Start at main.py."""
