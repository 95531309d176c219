"""One load by dlt, run by its own interpreter: `python dlt_load.py NAME [--cursor] [--first]`.

The logins are in .dlt/secrets.toml of the working directory. Without `--cursor` the whole table is
read. The backend is connectorx and the files are CSV, which Postgres takes by COPY: the fastest of
what dlt offers for this pair (its binary loader takes no jsonb). Its CSV files hold no arrays, so
the column `tags` stays behind.
"""

import sys

# Installed in dlt's own venv only.
import dlt  # type: ignore[import-not-found]
from dlt.sources.sql_database import sql_table  # type: ignore[import-not-found]


def main() -> None:
    name, cursor, first = sys.argv[1], "--cursor" in sys.argv, "--first" in sys.argv
    events = sql_table(
        schema="public",
        table="events",
        backend="connectorx",
        reflection_level="full_with_precision",
        excluded_columns=["tags"],
        write_disposition="replace" if first else "merge",
        primary_key="id",
        incremental=dlt.sources.incremental("updated_at") if cursor else None,
    )
    pipeline = dlt.pipeline(
        name, destination="postgres", dataset_name=name, pipelines_dir="pipelines"
    )
    pipeline.run(events, loader_file_format="csv").raise_on_failed_jobs()


if __name__ == "__main__":
    main()
