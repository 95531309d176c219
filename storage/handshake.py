"""Shake hands with the control database over TLS ourselves: libpq does not show a certificate."""

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
    """Connect as far as the certificate; no login, no password. Never raises."""
    parsed = parse_url(url)
    host, port = parsed.host or "", parsed.port or 5432
    where = f"{host}:{port}"
    roots = parsed.query.get("sslrootcert")
    try:
        context = _context(roots if isinstance(roots, str) else None)
        with socket.create_connection((host, port), timeout=_TIMEOUT_S) as raw:
            raw.sendall(_SSL_REQUEST)
            if raw.recv(1) != _YES:
                return LinkHealth(name)
            with context.wrap_socket(raw, server_hostname=host) as link:
                return LinkHealth(name, version=link.version(), expires_at=expiry(link))
    except ssl.SSLCertVerificationError as error:
        return LinkHealth(name, f"the certificate of {where} is not good: {error.verify_message}")
    except ssl.SSLError:
        return LinkHealth(name, f"{where} does not speak TLS 1.2 or later")
    except OSError:
        return LinkHealth(name, f"{where} or the file of sslrootcert cannot be reached")


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
