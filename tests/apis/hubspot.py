"""HubSpot's CRM API v3 and associations v4, as documented, on loopback.

Lists are consistent and come by id; the search comes late (`lag`), knows no archived record, gives
200 at a time and 10,000 of a query, and is limited to 5 calls a second.
"""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from tests.apis.clock import Clock, iso, moment
from tests.rest_api import Api, Asked, Reply

TOKEN = "pat-eu1-canary-1234"  # noqa: S105 - a secret to look for
#: Contacts are the only ones whose time has no prefix.
MODIFIED = {"contacts": "lastmodifieddate", "companies": "hs_lastmodifieddate"}
_LIST_MAX, _SEARCH_MAX, _INPUTS_MAX = 100, 200, 1_000


@dataclass
class Record:
    """One record and all of its versions, by the time they are from."""

    id: int
    created: datetime
    properties: dict[str, str | None]
    updated: datetime
    archived: datetime | None = None
    versions: list[tuple[datetime, dict[str, Any] | None]] = field(default_factory=list)

    def keep(self, modified: str) -> None:
        """Note what the search will find from now on, a while later."""
        if self.archived is not None:
            self.versions.append((self.archived, None))
            return
        self.properties[modified] = iso(self.updated)
        self.versions.append((self.updated, self.shown(set(self.properties))))

    def shown(self, properties: set[str]) -> dict[str, Any]:
        always = {"hs_object_id", "createdate", "lastmodifieddate", "hs_lastmodifieddate"}
        known = {k: v for k, v in self.properties.items() if k in properties | always}
        document: dict[str, Any] = {
            "id": str(self.id),
            "properties": {**dict.fromkeys(sorted(properties)), **known},
            "createdAt": iso(self.created),
            "updatedAt": iso(self.updated),
            "archived": self.archived is not None,
        }
        if self.archived is not None:
            document["archivedAt"] = iso(self.archived)
        return document


class HubSpot(Api):
    """One account; `create`, `edit`, `archive`, `relate` are what its users do."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = self.time = Clock()
        self.token = TOKEN
        self.expired = False
        self.lag = timedelta(0)
        self.search_results = 10_000
        self.searches_a_second = 5
        self.daily_left = 250_000
        self.records: dict[str, dict[int, Record]] = {"contacts": {}, "companies": {}, "deals": {}}
        self.related: dict[tuple[str, int, str], set[int]] = {}
        self._searches: list[float] = []
        self._next = 1_000

    # ── what users do ────────────────────────────────────────────────────────────────────────

    def create(self, kind: str, **properties: str) -> int:
        now, self._next = self.time.tick(), self._next + 1
        own = {"hs_object_id": str(self._next), "createdate": iso(now), **properties}
        record = Record(self._next, now, dict(own), now)
        record.keep(MODIFIED.get(kind, "hs_lastmodifieddate"))
        self.records[kind][self._next] = record
        return self._next

    def edit(self, kind: str, number: int, **properties: str) -> None:
        record = self.records[kind][number]
        record.properties |= properties
        record.updated = self.time.tick()
        record.keep(MODIFIED.get(kind, "hs_lastmodifieddate"))

    def archive(self, kind: str, number: int) -> None:
        record = self.records[kind][number]
        record.archived = self.time.tick()
        record.keep("")

    def restore(self, kind: str, number: int) -> None:
        self.records[kind][number].archived = None
        self.edit(kind, number)

    def relate(self, kind: str, number: int, other: str, *numbers: int) -> None:
        """Say what a record is associated with; other times stay as they are."""
        self.related[kind, number, other] = set(numbers)

    def alive(self, kind: str) -> dict[str, dict[str, str | None]]:
        """The properties of all that is not archived."""
        return {
            str(n): deepcopy(r.properties)
            for n, r in self.records[kind].items()
            if r.archived is None
        }

    # ── what it answers ──────────────────────────────────────────────────────────────────────

    def _reply(self, asked: Asked) -> Reply:
        refused = self.script.popleft() if self.script else self._refused(asked)
        if refused is not None:
            return refused
        self.daily_left -= 1
        parts = asked.path.strip("/").split("/")
        match asked.method, parts:
            case "GET", ["crm", "v3", "objects", kind] if kind in self.records:
                reply = self._list(kind, asked)
            case "POST", ["crm", "v3", "objects", kind, "search"] if kind in self.records:
                return self._search(kind, asked)
            case "POST", ["crm", "v4", "associations", kind, other, "batch", "read"]:
                reply = self._associations(kind, other, asked)
            case _:
                return _error(404, "OBJECT_NOT_FOUND", "resource not found")
        reply.headers |= {
            "X-HubSpot-RateLimit-Daily": "250000",
            "X-HubSpot-RateLimit-Daily-Remaining": str(self.daily_left),
            "X-HubSpot-RateLimit-Interval-Milliseconds": "10000",
            "X-HubSpot-RateLimit-Max": "100",
            "X-HubSpot-RateLimit-Remaining": "99",
        }
        return reply

    def _refused(self, asked: Asked) -> Reply | None:
        if asked.headers.get("authorization") != f"Bearer {self.token}":
            return _error(401, "INVALID_AUTHENTICATION", "Authentication credentials not found.")
        if self.expired:
            return _error(401, "EXPIRED_AUTHENTICATION", "The OAuth token has expired.")
        if self.daily_left <= 0:
            return _limited("DAILY", "You have reached your daily limit.")
        return None

    def _list(self, kind: str, asked: Asked) -> Reply:
        limit = int(asked.query.get("limit", 10))
        if not 1 <= limit <= _LIST_MAX:
            return _invalid(f"limit must be between 1 and {_LIST_MAX}")
        archived = asked.query.get("archived", "false").lower() == "true"
        after = int(asked.query.get("after", 0))
        named = {p for v in asked.values.get("properties", []) for p in v.split(",") if p}
        found = [
            r for n, r in sorted(self.records[kind].items())
            if n > after and (r.archived is not None) == archived
        ]  # fmt: skip
        page: dict[str, Any] = {"results": [r.shown(named) for r in found[:limit]]}
        if len(found) > limit:
            token = str(found[limit - 1].id)
            link = f"{self.url}{asked.path}?after={token}"
            page["paging"] = {"next": {"after": token, "link": link}}
        return Reply(200, page)

    def _search(self, kind: str, asked: Asked) -> Reply:
        now = monotonic()
        self._searches = [t for t in self._searches if now - t < 1] + [now]
        if len(self._searches) > self.searches_a_second:
            self._searches.pop()
            return _limited("SECONDLY", "You have reached your secondly limit.")
        body = json.loads(asked.body)
        limit, start = body.get("limit", 10), int(body.get("after", 0))
        if not 1 <= limit <= _SEARCH_MAX:
            return _invalid(f"limit must be between 1 and {_SEARCH_MAX}")
        if start + limit > self.search_results:
            return _invalid(f"The requested paging is beyond {self.search_results} results")
        groups, sorts = body.get("filterGroups", []), body.get("sorts", [])
        if len(groups) > 5 or any(len(g["filters"]) > 6 for g in groups) or len(sorts) > 1:
            return _invalid("too many filters or sorts")
        rows = [row for row in self._index(kind) if _matches(row, groups)]
        for sort in sorts:
            name = sort["propertyName"]
            rows.sort(key=lambda r: _comparable(r["properties"].get(name)))
            if sort.get("direction") == "DESCENDING":
                rows.reverse()
        named = set(body.get("properties", []))
        results = [_narrowed(row, named) for row in rows[start : start + limit]]
        page: dict[str, Any] = {"total": len(rows), "results": results}
        if len(rows) > start + limit:
            page["paging"] = {"next": {"after": str(start + limit)}}
        return Reply(200, page)

    def _index(self, kind: str) -> list[dict[str, Any]]:
        """What the search knows: the records as they were a while ago."""
        seen = self.time() - self.lag
        versions = [
            [v for at, v in record.versions if at <= seen][-1:]
            for record in self.records[kind].values()
        ]
        return [deepcopy(v) for some in versions for v in some if v is not None]

    def _associations(self, kind: str, other: str, asked: Asked) -> Reply:
        inputs = json.loads(asked.body)["inputs"]
        if len(inputs) > _INPUTS_MAX:
            return _invalid("too many inputs")
        results, errors = [], []
        for one in inputs:
            numbers = sorted(self.related.get((kind, int(one["id"]), other), ()))
            if not numbers:
                errors.append({
                    "status": "error", "category": "OBJECT_NOT_FOUND",
                    "subCategory": "crm.associations.NO_ASSOCIATIONS_FOUND",
                    "message": "No associations found", "context": {"fromObjectId": [one["id"]]},
                })  # fmt: skip
                continue
            label = {"category": "HUBSPOT_DEFINED", "typeId": 1, "label": None}
            to = [{"toObjectId": n, "associationTypes": [label]} for n in numbers]
            results.append({"from": {"id": one["id"]}, "to": to})
        now = iso(self.time())
        body: dict[str, Any] = {
            "status": "COMPLETE",
            "results": results,
            "startedAt": now,
            "completedAt": now,
        }
        if errors:
            body |= {"numErrors": len(errors), "errors": errors}
        return Reply(207 if errors else 200, body)


def _narrowed(row: dict[str, Any], named: set[str]) -> dict[str, Any]:
    always = {"hs_object_id", "createdate", "lastmodifieddate", "hs_lastmodifieddate"}
    found = {k: v for k, v in row["properties"].items() if k in named | always}
    return {**row, "properties": {**dict.fromkeys(sorted(named)), **found}}


def _comparable(value: str | None) -> float:
    if value is None:
        return -1.0
    return float(value) if value.isdecimal() else moment(value).timestamp() * 1000


def _matches(row: dict[str, Any], groups: list[dict[str, Any]]) -> bool:
    return not groups or any(all(_passes(row, f) for f in g["filters"]) for g in groups)


def _passes(row: dict[str, Any], one: dict[str, Any]) -> bool:
    value = row["properties"].get(one["propertyName"])
    if value is None:
        return False
    left, right = _comparable(value), _comparable(one["value"])
    return {
        "GTE": left >= right, "GT": left > right, "LTE": left <= right, "LT": left < right,
        "EQ": left == right,
    }[one["operator"]]  # fmt: skip


def _error(status: int, category: str, message: str) -> Reply:
    body = {
        "status": "error", "message": message, "category": category,
        "correlationId": "aeb5f871-7f07-4993-9211-075dc63e7cbf",
    }  # fmt: skip
    return Reply(status, body)


def _invalid(message: str) -> Reply:
    return _error(400, "VALIDATION_ERROR", message)


def _limited(policy: str, message: str) -> Reply:
    reply = _error(429, "RATE_LIMITS", message)
    reply.body |= {"errorType": "RATE_LIMIT", "policyName": policy}
    return reply
