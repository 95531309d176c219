"""GitHub's REST API for one repository, as documented, on loopback.

Pages come by number and are linked in a header; issues and comments can be asked for by `since`,
releases and commits cannot. Primary limits are told by headers, secondary ones by Retry-After.
"""

from copy import deepcopy
from typing import Any

from tests.apis.clock import Clock
from tests.rest_api import Api, Asked, Reply

TOKEN = "github_pat_canary1234"  # noqa: S105 - a secret to look for
_PAGE_MAX = 100
KINDS = ("issues", "comments", "commits", "releases")


class GitHub(Api):
    """One repository; `create`, `edit`, `delete` are what its users do."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = self.time = Clock()
        self.token = TOKEN
        self.kept: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self.assets: dict[int, list[dict[str, Any]]] = {}
        self.left = 5_000
        self.empty = False  # no commit yet
        self._next = 1_000

    # ── what users do ────────────────────────────────────────────────────────────────────────

    def create(self, kind: str, **fields: Any) -> int:
        self._next += 1
        at = self.written()
        made = {
            "id": self._next, "created_at": at, "updated_at": at, "user": {"login": "ada"},
            "body": None, **fields,
        }  # fmt: skip
        if kind == "issues":
            more = {"number": self._next, "state": "open", "labels": [], "comments": 0}
            made = {**more, "title": f"t{self._next}", "closed_at": None, **made}
        if kind == "releases":
            made |= {"tag_name": f"v{self._next}", "draft": False, "prerelease": False}
        self.kept[kind].append(made)
        return self._next

    def edit(self, kind: str, number: int, **fields: Any) -> None:
        self._find(kind, number).update({**fields, "updated_at": self.written()})

    def delete(self, kind: str, number: int) -> None:
        self.kept[kind].remove(self._find(kind, number))

    def written(self) -> str:
        return self.time.tick().strftime("%Y-%m-%dT%H:%M:%SZ")

    def _find(self, kind: str, number: int) -> dict[str, Any]:
        return next(one for one in self.kept[kind] if one["id"] == number)

    # ── what it answers ──────────────────────────────────────────────────────────────────────

    def _reply(self, asked: Asked) -> Reply:
        if self.script:
            return self.script.popleft()
        scheme, _, token = asked.headers.get("authorization", "").partition(" ")
        if scheme.lower() not in {"bearer", "token"} or token != self.token:
            return _error(401, "Bad credentials")
        if asked.headers.get("x-github-api-version", "2022-11-28") != "2022-11-28":
            return _error(400, "Unsupported API version")
        reset = str(int(self.time().timestamp()) + 1_800)
        limits = {
            "X-RateLimit-Limit": "5000", "X-RateLimit-Remaining": str(max(self.left - 1, 0)),
            "X-RateLimit-Reset": reset, "X-RateLimit-Resource": "core",
        }  # fmt: skip
        if self.left <= 0:
            refused = _error(403, "API rate limit exceeded")
            refused.headers = limits
            return refused
        self.left -= 1
        reply = self._answer(asked)
        reply.headers |= limits
        return reply

    def _answer(self, asked: Asked) -> Reply:
        rows: list[dict[str, Any]] | None = None
        match asked.path.strip("/").split("/"):
            case ["repos", "acme", "shop", "issues"]:
                rows = self._by_time(asked, "issues")
            case ["repos", "acme", "shop", "issues", "comments"]:
                rows = self._by_time(asked, "comments")
            case ["repos", "acme", "shop", "commits"] if self.empty:
                return _error(409, "Git Repository is empty.")
            case ["repos", "acme", "shop", "commits" | "releases" as kind]:
                rows = self.kept[kind][::-1]
            case ["repos", "acme", "shop", "releases", number, "assets"]:
                if int(number) in {one["id"] for one in self.kept["releases"]}:
                    rows = self.assets.get(int(number), [])
            case _:
                pass
        return _error(404, "Not Found") if rows is None else self._paged(asked, rows)

    def _by_time(self, asked: Asked, kind: str) -> list[dict[str, Any]]:
        since, query = asked.query.get("since", ""), asked.query
        name = {"updated": "updated_at", "created": "created_at"}[query.get("sort", "created")]
        closed = {"all"} if query.get("state") == "all" or kind == "comments" else {"open"}
        rows = [
            row for row in self.kept[kind]
            if row["updated_at"] >= since and ("all" in closed or row["state"] == "open")
        ]  # fmt: skip
        return sorted(rows, key=lambda r: str(r[name]), reverse=query.get("direction") != "asc")

    def _paged(self, asked: Asked, rows: list[dict[str, Any]]) -> Reply:
        size = min(int(asked.query.get("per_page", 30)), _PAGE_MAX)
        number = int(asked.query.get("page", 1))
        headers = {}
        if number * size < len(rows):
            last = -(-len(rows) // size)
            headers["Link"] = f'{self._link(asked, number + 1, "next")}, {self._link(asked, last, "last")}'  # noqa: E501  # fmt: skip
        return Reply(200, deepcopy(rows[(number - 1) * size : number * size]), headers)

    def _link(self, asked: Asked, number: int, rel: str) -> str:
        query = "&".join(f"{k}={v}" for k, v in {**asked.query, "page": number}.items())
        return f'<{self.url}{asked.path}?{query}>; rel="{rel}"'


def _error(status: int, message: str) -> Reply:
    return Reply(status, {"message": message, "documentation_url": "https://docs.github.com/rest"})


def slow_down(seconds: int) -> Reply:
    """What a secondary limit says."""
    reply = _error(403, "You have exceeded a secondary rate limit.")
    reply.headers = {"Retry-After": str(seconds)}
    return reply
