"""Shake hands over TLS ourselves: libpq and others do not show the certificate of a server."""

import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

from schemas.health import LinkHealth
from storage.engine import parse_url

_TIMEOUT_S = 5.0
#: Of the protocol of Postgres: may we speak TLS?
_SSL_REQUEST = bytes.fromhex("0000000804d2162f")
_YES = b"S"
#: Where libpq looks when the URL names no file.
_USUAL_ROOTS = Path("~/.postgresql/root.crt")


def try_link(name: str, url: str) -> LinkHealth:
    """Connect to a Postgres as far as the certificate; no login, no password. Never raises."""
    parsed = parse_url(url)
    roots = parsed.query.get("sslrootcert")
    return _try(
        name, (parsed.host or "", parsed.port or 5432), roots if isinstance(roots, str) else None,
        postgres=True,
    )  # fmt: skip


def try_server(name: str, host: str, port: int, roots: Path | None) -> LinkHealth:
    """Connect as far as the certificate to a server that speaks TLS at once. Never raises."""
    return _try(name, (host, port), str(roots) if roots else "system", postgres=False)


def _try(name: str, at: tuple[str, int], roots: str | None, *, postgres: bool) -> LinkHealth:
    where = f"{at[0]}:{at[1]}"
    try:
        context = _context(roots)
        with socket.create_connection(at, timeout=_TIMEOUT_S) as raw:
            if postgres:
                raw.sendall(_SSL_REQUEST)
                if raw.recv(1) != _YES:
                    return LinkHealth(name)
            with context.wrap_socket(raw, server_hostname=at[0]) as link:
                return LinkHealth(name, version=link.version(), expires_at=expiry(link))
    except ssl.SSLCertVerificationError as error:
        return LinkHealth(name, f"the certificate of {where} is not good: {error.verify_message}")
    except ssl.SSLError:
        return LinkHealth(name, f"{where} does not speak TLS 1.2 or later")
    except OSError:
        return LinkHealth(name, f"{where}, or the file of its authority, cannot be reached")


def _context(roots: str | None) -> ssl.SSLContext:
    file = Path(roots) if roots not in {None, "system"} else _USUAL_ROOTS.expanduser()
    named = roots != "system" and (roots is not None or file.exists())
    context = ssl.create_default_context(cafile=file if named else None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def expiry(link: ssl.SSLSocket) -> datetime | None:
    """Return until when the certificate holds that the other side has shown."""
    until = (link.getpeercert() or {}).get("notAfter")
    if not isinstance(until, str):
        return None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(until), UTC)
