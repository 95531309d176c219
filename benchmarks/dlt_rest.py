"""One load of the API by dlt, run by its own interpreter: `python dlt_rest.py NAME URL`.

The login is in .dlt/secrets.toml of the working directory. Its files are CSV, which Postgres takes
by COPY; the document stays one column of JSON instead of a column for each of its members.
"""

import sys

# Installed in dlt's own venv only.
import dlt  # type: ignore[import-not-found]
from dlt.sources.rest_api import rest_api_source  # type: ignore[import-not-found]


def main() -> None:
    name, url = sys.argv[1:]
    source = rest_api_source(
        {
            "client": {
                "base_url": url,
                "paginator": {
                    "type": "cursor", "cursor_path": "paging.after", "cursor_param": "after",
                },
            },
            "resources": [
                {
                    "name": "customers",
                    "primary_key": "id",
                    "write_disposition": "replace",
                    "columns": {
                        "balance": {"data_type": "decimal"},
                        "birthday": {"data_type": "date"},
                        "address": {"data_type": "json"},
                    },
                    "endpoint": {"path": "customers", "data_selector": "data"},
                }
            ],
        }
    )  # fmt: skip
    pipeline = dlt.pipeline(
        name, destination="postgres", dataset_name=name, pipelines_dir="pipelines"
    )
    pipeline.run(source, loader_file_format="csv").raise_on_failed_jobs()


if __name__ == "__main__":
    main()
