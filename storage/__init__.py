"""Everything that speaks SQL to the control database. Start at runs.py."""
