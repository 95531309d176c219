"""The manifest `github` against Prism, which serves GitHub's own OpenAPI document.

Prism refuses a request that the document does not allow, and answers with its examples: so paths,
parameters, headers, fields and types of the manifest are GitHub's. Paging is not: an example links
nowhere.
"""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from connectors.rest import manifest_files
from connectors.rest import trial as rest_trial
from tests.world import LOOSE

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

_PACKAGES = ["@stoplight/prism-cli@5.16.0", "@octokit/openapi@23.0.2"]
_REFERENCE = re.compile(r'"#/components/([^"/]+)/([^"]+)"')
_REPOSITORY = "/repos/{owner}/{repo}"
_PATHS = [
    "issues", "issues/comments", "commits", "releases", "releases/{release_id}/assets",
]  # fmt: skip


@pytest.fixture(scope="module")
def prism(tmp_path_factory):
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm; install it with: sudo apt-get install npm")
    place = tmp_path_factory.mktemp("prism")
    install = [
        npm,
        "install",
        "--prefix",
        str(place),
        "--no-fund",
        "--no-audit",
        "--ignore-scripts",
    ]
    subprocess.run([*install, *_PACKAGES], check=True, capture_output=True, timeout=300)
    modules = place / "node_modules"
    document = modules / "@octokit" / "openapi" / "generated" / "api.github.com.json"
    (place / "github.json").write_text(json.dumps(_part(json.loads(document.read_text()))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = subprocess.Popen(
        [modules / ".bin" / "prism", "mock", "-h", "127.0.0.1", "-p", port, place / "github.json"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    for line in started.stdout:
        if "is listening" in line:
            break
    yield f"http://127.0.0.1:{port}"
    started.terminate()
    started.communicate()
    shutil.rmtree(Path(place))


def _part(whole: dict[str, Any]) -> dict[str, Any]:
    """The paths that the manifest asks for, and what they refer to."""
    paths = {
        f"{_REPOSITORY}/{p}": {"get": whole["paths"][f"{_REPOSITORY}/{p}"]["get"]} for p in _PATHS
    }
    for path in paths.values():
        answer = path["get"]["responses"]["200"]
        del answer["headers"]  # an example of a link, to the real GitHub
        answer["content"]["application/vnd.github+json"] = answer["content"]["application/json"]
    components: dict[str, dict[str, Any]] = {}
    left: list[Any] = [paths]
    while left:
        for kind, name in _REFERENCE.findall(json.dumps(left.pop())):
            if name not in components.setdefault(kind, {}):
                components[kind][name] = whole["components"][kind][name]
                left.append(components[kind][name])
    head = {name: whole[name] for name in ("openapi", "info", "servers")}
    return {**head, "paths": paths, "components": components}


def test_every_request_is_one_of_the_document_and_every_example_fits_the_schema(prism):
    manifest = manifest_files.of_resource("github")
    parameters = {"base_url": prism, "owner": "octocat", "repository": "Hello-World"}
    for name, stream in manifest.streams.items():
        secrets = {"token": "a-token-of-nobody"}
        tried = rest_trial.attempt(manifest, parameters, secrets, LOOSE, stream=name, limit=1)
        assert len(tried.rows) == 1, name
        row = dict(zip(tried.columns, tried.rows[0], strict=True))
        needed = {*stream.primary_key, *(["updated_at"] if stream.incremental_sync else [])}
        assert all(row[column] is not None for column in needed), name
