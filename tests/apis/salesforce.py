"""Salesforce's REST API and Bulk API 2.0 queries, as documented, on loopback.

SOQL of one object with a WHERE by comparisons; `query` knows no deleted record, `queryAll` does;
results come in pieces with a locator that may be forgotten; a bulk query is a job whose rows are
CSV. Tokens come by client credentials, and end.
"""

import csv
import io
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any
from urllib.parse import parse_qs

from tests.apis.clock import Clock
from tests.rest_api import Api, Asked, Reply

CLIENT, SECRET = "3MVG9canary", "canary-secret-5678"
VERSION = "/services/data/v61.0"
Fields = dict[str, str]  # of an object: their types, as describe names them
_ALWAYS: Fields = {
    "Id": "id", "Name": "string", "CreatedDate": "datetime", "SystemModstamp": "datetime",
}  # fmt: skip
_MORTAL: Fields = {**_ALWAYS, "IsDeleted": "boolean"}
OBJECTS: dict[str, tuple[str, Fields]] = {
    "Account": ("001", {
        **_MORTAL, "Industry": "picklist", "NumberOfEmployees": "int",
        "AnnualRevenue": "currency", "BillingCity": "string", "BillingAddress": "address",
        "OwnerId": "reference", "Founded__c": "date", "Score__c": "double", "Notes__c": "textarea",
    }),
    "Contact": ("003", {**_MORTAL, "Email": "email", "AccountId": "reference"}),
    "Opportunity": ("006", {**_MORTAL, "Amount": "currency", "StageName": "picklist"}),
    "Lead": ("00Q", {**_MORTAL, "Email": "email"}),
    "User": ("005", {**_ALWAYS, "Username": "string", "IsActive": "boolean"}),
}  # fmt: skip
_SOQL = re.compile(
    r"SELECT (?P<fields>[\w, ]+?) FROM (?P<object>\w+)(?: WHERE (?P<where>.+?))?"
    r"(?: ORDER BY (?P<order>\w+)(?: (?P<way>ASC|DESC))?)?(?: LIMIT (?P<limit>\d+))?"
)
_COMPARED = {
    ">=": lambda a, b: a >= b, ">": lambda a, b: a > b, "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b, "=": lambda a, b: a == b,
}  # fmt: skip


class Refused(Exception):  # noqa: N818 - says what it is
    """A request that gets an error in Salesforce's shape."""

    def __init__(self, status: int, code: str, message: str = "refused") -> None:
        super().__init__(code)
        self.reply = Reply(status, [{"errorCode": code, "message": message}])


@dataclass
class Job:
    number: str
    query: str
    operation: str
    rows: list[dict[str, Any]]
    questions: int = 0
    state: str = "UploadComplete"


class Salesforce(Api):
    """One organisation; `create`, `edit`, `delete`, `erase` are what its users do."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = self.time = Clock()
        self.secret = SECRET
        self.tokens: set[str] = set()
        self.records: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in OBJECTS}
        self.fields = {name: dict(fields) for name, (_, fields) in OBJECTS.items()}
        self.piece = 100  # rows of a piece of a result
        self.questions = 0  # about a job, before it is done
        self.job_ends = "JobComplete"
        self.calls_left = 100_000
        self.locators: dict[str, list[dict[str, Any]]] = {}
        self.jobs: dict[str, Job] = {}
        self.jobs_removed: list[str] = []
        self._numbers = count(1)

    # ── what users do ────────────────────────────────────────────────────────────────────────

    def create(self, kind: str, **fields: Any) -> str:
        id_ = f"{OBJECTS[kind][0]}{next(self._numbers):012}AAA"
        now = self.time.tick()
        made: dict[str, Any] = dict.fromkeys(self.fields[kind])
        deleted = {"IsDeleted": False} if "IsDeleted" in made else {}
        self.records[kind][id_] = {
            **made, **deleted, "Id": id_, "CreatedDate": now, "SystemModstamp": now, **fields,
        }  # fmt: skip
        return id_

    def edit(self, kind: str, id_: str, **fields: Any) -> None:
        self.records[kind][id_] |= {**fields, "SystemModstamp": self.time.tick()}

    def delete(self, kind: str, id_: str) -> None:
        self.edit(kind, id_, IsDeleted=True)

    def undelete(self, kind: str, id_: str) -> None:
        self.edit(kind, id_, IsDeleted=False)

    def erase(self, kind: str, id_: str) -> None:
        """Delete it, and empty the recycle bin."""
        del self.records[kind][id_]

    def alive(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in self.records[kind].values() if not one.get("IsDeleted")]

    # ── what it answers ──────────────────────────────────────────────────────────────────────

    def _reply(self, asked: Asked) -> Reply:
        if self.script:
            return self.script.popleft()
        if asked.path == "/services/oauth2/token":
            return self._token(asked)
        try:
            self._check(asked)
            reply = self._answer(asked, asked.path.removeprefix(VERSION).strip("/").split("/"))
        except Refused as refused:
            return refused.reply
        used = 100_000 - self.calls_left
        reply.headers.setdefault("Sforce-Limit-Info", f"api-usage={used}/100000")
        return reply

    def _token(self, asked: Asked) -> Reply:
        form = {k: v[-1] for k, v in parse_qs(asked.body.decode()).items()}
        if form.get("grant_type") != "client_credentials":
            return Reply(400, {"error": "unsupported_grant_type"})
        if (form.get("client_id"), form.get("client_secret")) != (CLIENT, self.secret):
            return Reply(400, {"error": "invalid_client", "error_description": "no such client"})
        token = f"00Dcanary!{next(self._numbers)}"
        self.tokens.add(token)
        answer = {
            "access_token": token, "token_type": "Bearer", "instance_url": self.url,
            "issued_at": str(int(self.time().timestamp() * 1000)), "signature": "c2ln",
        }  # fmt: skip
        return Reply(200, answer)

    def _check(self, asked: Asked) -> None:
        if asked.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            raise Refused(401, "INVALID_SESSION_ID", "Session expired or invalid")
        if self.calls_left <= 0:
            raise Refused(403, "REQUEST_LIMIT_EXCEEDED", "TotalRequests Limit exceeded.")
        self.calls_left -= 1
        if not asked.path.startswith(VERSION):
            raise Refused(404, "NOT_FOUND", "The requested resource does not exist")

    def _answer(self, asked: Asked, parts: list[str]) -> Reply:
        match asked.method, parts:
            case "GET", ["sobjects", kind, "describe"] if kind in self.fields:
                return Reply(200, self._described(kind))
            case "GET", ["query" | "queryAll" as way]:
                rows, kind = self._found(asked.query["q"], everything=way == "queryAll")
                return self._pieces(rows, kind, 0, f"01g{next(self._numbers):012}")
            case "GET", ["query" | "queryAll", locator]:
                name, _, start = locator.rpartition("-")
                if name not in self.locators:
                    raise Refused(400, "INVALID_QUERY_LOCATOR", "invalid query locator")
                rows = self.locators[name]
                return self._pieces(rows, "", int(start), name)
            case "POST", ["jobs", "query"]:
                return self._new_job(json.loads(asked.body))
            case _, ["jobs", "query", number, *below] if number in self.jobs:
                return self._about_job(asked, self.jobs[number], below)
        raise Refused(404, "NOT_FOUND", "The requested resource does not exist")

    def _described(self, kind: str) -> dict[str, Any]:
        fields = [
            {"name": n, "type": t, "nillable": n != "Id", "custom": n.endswith("__c"), "label": n}
            for n, t in self.fields[kind].items()
        ]
        return {"name": kind, "queryable": True, "fields": fields}

    def _found(self, soql: str, *, everything: bool) -> tuple[list[dict[str, Any]], str]:
        match = _SOQL.fullmatch(" ".join(soql.split()))
        if match is None:
            raise Refused(400, "MALFORMED_QUERY", "unexpected token")
        kind = match["object"]
        if kind not in self.fields:
            raise Refused(400, "INVALID_TYPE", f"sObject type '{kind}' is not supported.")
        names = [name.strip() for name in match["fields"].split(",")]
        rows = [r for r in self.records[kind].values() if everything or not r.get("IsDeleted")]
        for part in (match["where"] or "").split(" AND ") if match["where"] else []:
            name, sign, value = part.split(" ")
            names_known(self.fields[kind], [name])
            rows = [r for r in rows if _COMPARED[sign](r[name], literal(value))]
        names_known(self.fields[kind], names)
        if match["order"]:
            rows.sort(key=lambda r: r[match["order"]], reverse=match["way"] == "DESC")
        rows = rows[: int(match["limit"])] if match["limit"] else rows
        return [{n: row[n] for n in names} for row in rows], kind

    def _pieces(self, rows: list[dict[str, Any]], kind: str, start: int, name: str) -> Reply:
        if kind:  # a new query: what it found stays as it was then
            rows = [{"attributes": attributes(kind, row), **_shown(row)} for row in rows]
        page = {"totalSize": len(rows), "records": rows[start : start + self.piece]}
        if start + self.piece >= len(rows):
            self.locators.pop(name, None)
            return Reply(200, {**page, "done": True})
        self.locators[name] = rows
        next_ = f"{VERSION}/query/{name}-{start + self.piece}"
        return Reply(200, {**page, "done": False, "nextRecordsUrl": next_})

    # ── bulk ─────────────────────────────────────────────────────────────────────────────────

    def _new_job(self, body: dict[str, Any]) -> Reply:
        everything = {"query": False, "queryAll": True}[body["operation"]]
        rows, kind = self._found(body["query"], everything=everything)
        if "address" in {self.fields[kind][n] for n in (rows[0] if rows else {})}:
            raise Refused(400, "FUNCTIONALITY_NOT_ENABLED", "compound data not supported")
        job = Job(f"750{next(self._numbers):012}AAA", body["query"], body["operation"], rows)
        self.jobs[job.number] = job
        return Reply(200, self._told(job))

    def _told(self, job: Job) -> dict[str, Any]:
        return {
            "id": job.number, "operation": job.operation, "state": job.state, "contentType": "CSV",
            "concurrencyMode": "Parallel", "apiVersion": 61.0, "lineEnding": "LF",
            "columnDelimiter": "COMMA",
        }  # fmt: skip

    def _about_job(self, asked: Asked, job: Job, below: list[str]) -> Reply:
        if asked.method == "DELETE":
            del self.jobs[job.number]
            self.jobs_removed.append(job.number)
            return Reply(204, b"")
        if not below:
            job.questions += 1
            job.state = "InProgress" if job.questions <= self.questions else self.job_ends
            return Reply(200, self._told(job))
        if job.state != "JobComplete":
            raise Refused(400, "INVALIDJOBSTATE", "the job is not done")
        most, start = int(asked.query.get("maxRecords", 50_000)), int(asked.query.get("locator", 0))
        some = job.rows[start : start + min(most, self.piece)]
        end = start + len(some)
        headers = {
            "Content-Type": "text/csv", "Sforce-NumberOfRecords": str(len(some)),
            "Sforce-Locator": str(end) if end < len(job.rows) else "null",
        }  # fmt: skip
        return Reply(200, _as_csv(some), headers)


def names_known(fields: Fields, names: list[str]) -> None:
    for name in names:
        if name not in fields:
            raise Refused(400, "INVALID_FIELD", f"No such column '{name}' on entity")


def literal(text: str) -> Any:
    """A value of SOQL."""
    if text in {"true", "false"}:
        return text == "true"
    return text[1:-1] if text.startswith("'") else datetime.fromisoformat(text)


def attributes(kind: str, row: dict[str, Any]) -> dict[str, str]:
    return {"type": kind, "url": f"{VERSION}/sobjects/{kind}/{row.get('Id', '')}"}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        n: v.strftime("%Y-%m-%dT%H:%M:%S.000+0000") if isinstance(v, datetime) else v
        for n, v in row.items()
    }


def _as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    write = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    if rows:
        write.writerow(rows[0])
        write.writerows([_in_csv(value) for value in row.values()] for row in rows)
    return text.getvalue().encode()


def _in_csv(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return "" if value is None else str(value)
