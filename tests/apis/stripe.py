"""Stripe's list API and its events, as documented, on loopback.

Lists come newest first and know only when an object was created; an event has the object as it was
then, and is kept for 30 days.
"""

import re
from copy import deepcopy
from typing import Any

from tests.apis.clock import Clock
from tests.rest_api import Api, Asked, Reply

TOKEN = "rk_live_canary1234"  # noqa: S105 - a secret to look for
_LIMIT_MAX, _TYPES_MAX = 100, 20
_KEPT_S = 30 * 86_400
#: What each list is called in an id, in `object`, and in the names of events.
KINDS = {
    "customers": ("cus", "customer", "customer"), "products": ("prod", "product", "product"),
    "prices": ("price", "price", "price"), "invoices": ("in", "invoice", "invoice"),
    "subscriptions": ("sub", "subscription", "customer.subscription"),
    "charges": ("ch", "charge", "charge"),
    "balance_transactions": ("txn", "balance_transaction", ""),
}  # fmt: skip
_FILTERS = {
    "gte": lambda a, b: a >= b, "gt": lambda a, b: a > b, "lte": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
}  # fmt: skip


class Stripe(Api):
    """One account; `create`, `edit`, `delete` are what its users do."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = self.time = Clock()
        self.token = TOKEN
        self.kept: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self.events: list[dict[str, Any]] = []
        self._next = 100

    # ── what users do ────────────────────────────────────────────────────────────────────────

    def create(self, kind: str, **fields: Any) -> str:
        prefix, name, events = KINDS[kind]
        self._next += 1
        made = {
            "id": f"{prefix}_{self._next}", "object": name, "livemode": True, "metadata": {},
            "created": int(self.time.tick().timestamp()), **fields,
        }  # fmt: skip
        self.kept[kind].insert(0, made)
        self._tell(f"{events}.created", made)
        return str(made["id"])

    def edit(self, kind: str, id_: str, *, same_second: bool = False, **fields: Any) -> None:
        if not same_second:
            self.time.tick()
        found = self._find(kind, id_)
        assert found is not None
        before = {k: found.get(k) for k in fields}
        found |= fields
        self._tell(f"{KINDS[kind][2]}.updated", found, previous=before)

    def delete(self, kind: str, id_: str) -> None:
        self.time.tick()
        found = self._find(kind, id_)
        assert found is not None
        self.kept[kind].remove(found)
        self._tell(f"{KINDS[kind][2]}.deleted", found)

    def _tell(
        self, type_: str, made: dict[str, Any], previous: dict[str, Any] | None = None
    ) -> None:
        self._next += 1
        data: dict[str, Any] = {"object": deepcopy(made)}
        if previous is not None:
            data["previous_attributes"] = previous
        event = {
            "id": f"evt_{self._next}", "object": "event", "type": type_, "livemode": True,
            "created": int(self.time().timestamp()), "data": data, "api_version": "2024-06-20",
            "pending_webhooks": 0, "request": {"id": None, "idempotency_key": None},
        }  # fmt: skip
        self.events.insert(0, event)

    def _find(self, kind: str, id_: str) -> dict[str, Any] | None:
        return next((one for one in self.kept[kind] if one["id"] == id_), None)

    # ── what it answers ──────────────────────────────────────────────────────────────────────

    def _reply(self, asked: Asked) -> Reply:
        reply = self.script.popleft() if self.script else self._answer(asked)
        reply.headers.setdefault("Request-Id", "req_canary")
        return reply

    def _answer(self, asked: Asked) -> Reply:
        if asked.headers.get("authorization") != f"Bearer {self.token}":
            return error(401, "Invalid API Key provided: rk_live_*****1234")
        parts = asked.path.strip("/").split("/")
        match asked.method, parts:
            case "GET", ["v1", "events"]:
                more = {name for name in asked.query if re.fullmatch(r"types\[\d*\]", name)}
                return self._listed(asked, self._events(asked), {*more, "type"})
            case "GET", ["v1", kind] if kind in KINDS:
                more = {"status"} if kind == "subscriptions" else set()
                return self._listed(asked, self.kept[kind], more)
            case "GET", ["v1", kind, id_] if kind in KINDS:
                found = self._find(kind, id_)
                return Reply(200, found) if found else _missing(kind, id_, "id")
            case _:
                return error(404, f"Unrecognized request URL ({asked.method}: {asked.path}).")

    def _events(self, asked: Asked) -> list[dict[str, Any]]:
        since, types = self.time().timestamp() - _KEPT_S, _types(asked)
        assert len(types) <= _TYPES_MAX
        return [
            e for e in self.events
            if e["created"] >= since and (not types or e["type"] in types)
            and _of_type(e["type"], asked.query.get("type"))
        ]  # fmt: skip

    def _listed(self, asked: Asked, found: list[dict[str, Any]], more: set[str]) -> Reply:
        known = {"limit", "starting_after", *more, *(f"created[{name}]" for name in _FILTERS)}
        for name in asked.query:
            if name not in known:
                return error(400, f"Received unknown parameter: {name}", param=name)
        limit = int(asked.query.get("limit", 10))
        if not 1 <= limit <= _LIMIT_MAX:
            return error(400, "This value must be between 1 and 100.", param="limit")
        after = asked.query.get("starting_after")
        if after is not None:
            ids = [one["id"] for one in found]
            if after not in ids:
                return _missing(asked.path, after, "starting_after")
            found = found[ids.index(after) + 1 :]
        for name, holds in _FILTERS.items():
            bound = asked.query.get(f"created[{name}]")
            if bound is not None:
                found = [one for one in found if holds(one["created"], int(bound))]
        page = {
            "object": "list", "url": asked.path, "has_more": len(found) > limit,
            "data": deepcopy(found[:limit]),
        }  # fmt: skip
        return Reply(200, page)


def _types(asked: Asked) -> list[str]:
    """The wanted types, with or without their numbers."""
    return [one for name, some in asked.values.items() if name.startswith("types[") for one in some]


def _of_type(type_: str, wanted: str | None) -> bool:
    if wanted is None:
        return True
    return type_.startswith(wanted[:-1]) if wanted.endswith("*") else type_ == wanted


def error(status: int, message: str, *, code: str | None = None, param: str | None = None) -> Reply:
    """An error in Stripe's shape."""
    body = {"type": "invalid_request_error", "message": message}
    body |= {"code": code} if code else {}
    body |= {"param": param} if param else {}
    return Reply(status, {"error": body})


def limited() -> Reply:
    """Too many calls at once; nothing says for how long."""
    reply = error(429, "Request rate limit exceeded.", code="rate_limit")
    reply.headers = {"Stripe-Rate-Limited-Reason": "global-rate"}
    return reply


def _missing(kind: str, id_: str, param: str) -> Reply:
    return error(404 if param == "id" else 400, f"No such {kind}: '{id_}'",
                 code="resource_missing", param=param)  # fmt: skip
