"""Step 2: pick fairly. Pure: what waits and what is free in, runs for the queue out."""

import heapq
from collections import defaultdict, deque
from uuid import UUID

from storage.dispatch import Candidate, Waiting


def pick(seen: Waiting, wanted: int) -> list[Candidate]:
    """Choose at most `wanted` runs in weighted stride order over accounts, under every cap.

    Each pick advances its account's virtual time by 1/weight, so an account with 10,000 due runs
    takes turns with one that has a single run. A candidate whose resource is full is passed over,
    without stopping those behind it.
    """
    queues = _by_account(seen)
    free = {a.account_id: a.free for a in seen.accounts}
    resources = dict(seen.resource_free)
    turns = [(a.vtime, a.account_id, a.weight) for a in seen.accounts if queues[a.account_id]]
    heapq.heapify(turns)
    picked: list[Candidate] = []
    while turns and len(picked) < wanted:
        vtime, account_id, weight = heapq.heappop(turns)
        if free[account_id] <= 0:
            continue
        chosen = _next_fitting(queues[account_id], resources)
        if chosen is None:
            continue
        picked.append(chosen)
        free[account_id] -= 1
        for resource in chosen.resources:
            resources[resource] = resources.get(resource, 1) - 1
        heapq.heappush(turns, (vtime + 1 / weight, account_id, weight))
    return picked


def _by_account(seen: Waiting) -> dict[UUID, deque[Candidate]]:
    queues: dict[UUID, deque[Candidate]] = defaultdict(deque)
    for candidate in seen.candidates:
        queues[candidate.account_id].append(candidate)
    return queues


def _next_fitting(queue: deque[Candidate], resources: dict[UUID, int]) -> Candidate | None:
    while queue:
        candidate = queue.popleft()
        if all(resources.get(resource, 1) > 0 for resource in candidate.resources):
            return candidate
    return None
