"""An API on loopback that costs next to nothing: its pages are written before anybody asks.

`python rest_server.py ROWS PAGE_SIZE` prints its port and serves `/customers?after=TOKEN` until its
standard input ends. It is so plain that every client is measured against itself.
"""

import json
import sys
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit


def record(number: int) -> dict[str, object]:
    """Return a customer: ten typed fields and one document."""
    day = 1 + number % 28
    return {
        "id": number,
        "email": f"customer{number}@example.com",
        "name": f"Customer {number} of the house",
        "balance": round(number * 1.37 % 100_000, 2),
        "orders": number % 100,
        "active": number % 2 == 0,
        "created_at": f"2026-01-{day:02}T10:{number % 60:02}:{number // 60 % 60:02}Z",
        "updated_at": f"2026-03-{day:02}T12:{number % 60:02}:{number // 60 % 60:02}.123Z",
        "birthday": f"19{10 + number % 90}-05-{day:02}",
        "note": None if number % 3 else "pays late, is kind",
        "address": {"street": f"Main Street {number % 900}", "zip": f"{number % 99_999:05}",
                    "place": {"lat": 52.5 + number % 7 / 10, "lon": 13.25}},
    }  # fmt: skip


def pages(rows: int, size: int) -> list[bytes]:
    """Return all answers, ready to be sent."""
    made = []
    for start in range(0, rows, size):
        end = min(start + size, rows)
        after = str(end) if end < rows else None
        body = {"data": [record(n) for n in range(start, end)], "paging": {"after": after}}
        made.append(json.dumps(body, separators=(",", ":")).encode())
    return made


def server(rows: int, size: int) -> ThreadingHTTPServer:
    """Return a server of these rows, not yet started."""
    answers = pages(rows, size)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            body = answers[int(query.get("after", ["0"])[0]) // size]
            head = (
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            self.wfile.write(head.encode() + body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its signature
            """Say nothing of each request."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def ceiling(url: str, rows: int, size: int) -> float:
    """Return how many records a second a client gets that only takes the bytes, page after page."""
    client = HTTPConnection(urlsplit(url).netloc)
    started = time.monotonic()
    for after in range(0, rows, size):
        client.request("GET", f"/customers?after={after}")
        client.getresponse().read()
    spent = time.monotonic() - started
    client.close()
    return rows / spent


def main() -> None:
    rows, size = map(int, sys.argv[1:])
    serving = server(rows, size)
    Thread(target=serving.serve_forever, daemon=True).start()
    print(serving.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
