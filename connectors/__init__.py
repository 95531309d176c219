"""One file per system; knows nothing of runs, accounts or keys. Start at registry.py."""
