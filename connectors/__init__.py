"""Other systems; knows nothing of runs, accounts or keys. Start at registry.py.

`sources/` and `destinations/` hold one file per system, by whose name it is found; what such a
file is made of is a package beside them (`postgres/`, `rest/`, …); modules here serve several.
"""
