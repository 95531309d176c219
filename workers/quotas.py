"""Quotas that all workers share: counted in Redis, by Redis' clock. Start at `SharedQuotas.hold`.

A quota has one key, which says nothing to whoever reads it and goes with its last window. One
script counts, so a call costs one round trip. A Redis that is away, or has lost what it knew, stops
nobody: docs/calls.md says what holds then.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from secrets import token_hex
from threading import Event, Lock
from time import monotonic
from uuid import UUID

import redis

from schemas.errors import Deferral
from schemas.limits import DEFERRED_MAX
from schemas.quotas import Hold, Quota, Rate, Shown, Windows, in_turn, unseen
from workers.enqueue import NAMESPACE
from workers.metrics import (
    QUOTA_DEFERRALS,
    QUOTA_WAITED,
    QUOTA_WAITS,
    QUOTAS_ALONE,
    connector_of,
)

#: Of each rate, a process that counts alone takes one part in so many.
ALONE_SHARE = 8
#: Seconds before a Redis that did not answer is asked again, or three times as long as it took.
ASK_AGAIN_S = 1.0
#: Quotas that a process remembers.
QUOTAS_MAX = 10_000
#: An API is asked again after so long, whatever it said.
CLOSED_MAX_S = DEFERRED_MAX.total_seconds()

logger = logging.getLogger(__name__)

#: KEYS: the quota. ARGV: the era that the caller knows, a new one, milliseconds to close it for (0:
#: a turn is asked for), the number of rates; for each its calls, width, slices behind, and what the
#: caller has used of it: in this window, and of that what Redis was never told.
#: Answers: milliseconds to wait (0: the call counts), which rate is used up (0: closed), the era,
#: and when that was.
#: A window is written `slice:calls slice:calls …`; one of the future is a clock that went back.
_SCRIPT = """
local key, time = KEYS[1], redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local closing, rates = tonumber(ARGV[3]), tonumber(ARGV[4])
local names = {'era', 'closed'}
for i = 1, rates do names[i + 2] = 'w' .. i end
local seen = redis.call('HMGET', key, unpack(names))
local era = seen[1] or ARGV[2]
local lost = era ~= ARGV[1]
local closed = tonumber(seen[2] or '0')
if closed > now + LONGEST then closed = 0 end  -- nobody closes for so long: the clock went back
local wait, which, life, changed = closed - now, 0, 1000, closing > 0
if wait < 0 then wait = 0 end
local windows = {}
for i = 1, rates do
  local at = 4 + (i - 1) * 5
  local calls, width = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local behind = tonumber(ARGV[at + 3])
  local more = tonumber(ARGV[at + (lost and 4 or 5)])
  local present, sum, slices, counts = math.floor(now / width), 0, {}, {}
  local function add(slice, count)
    if slice > present then slice = present end
    if slices[#slices] == slice then
      counts[#counts] = counts[#counts] + count
    else
      slices[#slices + 1], counts[#counts + 1] = slice, count
    end
    sum = sum + count
  end
  for slice, count in string.gmatch(seen[i + 2] or '', '(%d+):(%d+)') do
    slice = tonumber(slice)
    if slice >= present - behind then add(slice, tonumber(count)) end
  end
  if more > 0 then
    add(present, more)
    changed = true
  end
  if sum >= calls then
    local left = sum
    for j = 1, #slices do
      left = left - counts[j]
      if left < calls then
        local free = (slices[j] + behind + 1) * width - now
        if free > wait then wait, which = free, i end
        break
      end
    end
  end
  life = math.max(life, (behind + 1) * width + 1000)
  windows[i] = {add, slices, counts, present}
end
if closing > 0 then
  closed = math.max(closed, now + closing)
elseif wait == 0 and rates > 0 then
  changed = true
  for i = 1, rates do windows[i][1](windows[i][4], 1) end
end
if changed then
  local fields = {'era', era, 'closed', string.format('%.0f', closed)}
  for i = 1, rates do
    local parts = {}
    for j, slice in ipairs(windows[i][2]) do
      parts[j] = string.format('%.0f:%.0f', slice, windows[i][3][j])
    end
    fields[#fields + 1] = 'w' .. i
    fields[#fields + 1] = table.concat(parts, ' ')
  end
  redis.call('HSET', key, unpack(fields))
  redis.call('PEXPIRE', key, string.format('%.0f', math.max(life, closed - now + 1000)))
end
return {string.format('%.0f', wait), which, era, string.format('%.0f', now)}
""".replace("LONGEST", f"{CLOSED_MAX_S * 1_000:.0f}")


@dataclass(slots=True)
class _Known:
    """What this process knows of one quota by itself."""

    used: Windows  # all its own calls, to tell a Redis that has forgotten them
    era: str = ""
    alone: Windows | None = None  # those since Redis went away, which it was never told of
    closed_until: float = 0.0


@dataclass
class SharedQuotas:
    """The quotas of all runs of a worker process. Any thread may ask."""

    client: redis.Redis
    clock: Callable[[], float] = monotonic
    _known: OrderedDict[str, _Known] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)
    _ask_at: float = float("-inf")
    _is_away: bool = False

    @cached_property
    def _script(self) -> Callable[..., Sequence[bytes | int]]:
        script: Callable[..., Sequence[bytes | int]] = self.client.register_script(_SCRIPT)
        return script

    def hold(self, key: str, quota: Quota) -> Hold | None:
        """Count a call and return None, or say what holds it back."""
        if self.clock() >= self._ask_at:
            try:
                return self._shared(key, quota)
            except redis.RedisError as error:
                self._gone(error)
        return self._alone(key, quota)

    def close(self, key: str, quota: Quota, seconds: float) -> None:
        """Let nobody call for so long; bounded, so that a wrong answer shuts no API for months."""
        seconds = min(seconds, CLOSED_MAX_S)
        with self._lock:
            known = self._of(key, quota)
            known.closed_until = max(known.closed_until, self.clock() + seconds)
        if self.clock() >= self._ask_at:
            try:
                self._asked(key, quota, closing=max(round(seconds * 1_000), 1))
            except redis.RedisError as error:
                self._gone(error)

    # ── with Redis ───────────────────────────────────────────────────────────────────────────

    def _shared(self, key: str, quota: Quota) -> Hold | None:
        wait, which, _ = self._asked(key, quota, closing=0)
        with self._lock:
            known = self._of(key, quota)
            if not wait:
                known.used.add(self._now_ms())
                return None
            if not which:
                known.closed_until = self.clock() + wait / 1_000
        return Hold(wait / 1_000, quota.rates[which - 1] if which else None)

    def _asked(self, key: str, quota: Quota, *, closing: int) -> tuple[int, int, int]:
        """Run the script; return milliseconds to wait, the number of the rate, Redis' time."""
        with self._lock:
            known, now = self._of(key, quota), self._now_ms()
            era, used = known.era, known.used.counts(now)
            untold = [0] * len(used) if known.alone is None else known.alone.counts(now)
        arguments: list[str | int] = [era, token_hex(8), closing, len(quota.rates)]
        for rate, mine, mine_untold in zip(quota.rates, used, untold, strict=True):
            arguments += [rate.calls, rate.width, rate.behind, mine, mine_untold]
        began = self.clock()
        try:
            wait, which, new_era, at = self._script(keys=[key], args=arguments)
        except redis.RedisError:
            with self._lock:
                self._ask_at = self.clock() + max(ASK_AGAIN_S, 3 * (self.clock() - began))
            raise
        with self._lock:
            known.era, known.alone = _text(new_era), None
        self._back()
        return int(_text(wait)), int(which), int(_text(at))

    def _gone(self, error: redis.RedisError) -> None:
        with self._lock:
            first, self._is_away = not self._is_away, True
        if first:
            QUOTAS_ALONE.set(1)
            logger.warning("quotas_alone", extra={"reason": _reason(error)})

    def _back(self) -> None:
        with self._lock:
            first, self._is_away = self._is_away, False
        if first:
            QUOTAS_ALONE.set(0)
            logger.info("quotas_shared_again")

    # ── without ──────────────────────────────────────────────────────────────────────────────

    def _alone(self, key: str, quota: Quota) -> Hold | None:
        """Take a small part of each rate: other processes take theirs."""
        with self._lock:
            known, now = self._of(key, quota), self._now_ms()
            left = known.closed_until - self.clock()
            if left > 0:
                return Hold(left, None)
            if known.alone is None:
                known.alone = Windows([_share(rate) for rate in quota.rates])
            hold = known.alone.hold(now)
            if hold is None:
                known.alone.add(now)
                known.used.add(now)
            return hold

    def _of(self, key: str, quota: Quota) -> _Known:
        known = self._known.pop(key, None) or _Known(Windows(quota.rates))
        self._known[key] = known
        while len(self._known) > QUOTAS_MAX:
            self._known.popitem(last=False)
        return known

    def _now_ms(self) -> int:
        return int(self.clock() * 1_000)


def _share(rate: Rate) -> Rate:
    return replace(rate, calls=max(rate.calls // ALONE_SHARE, 1))


def _text(value: bytes | int) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _reason(error: redis.RedisError) -> str:
    """Say in our words why Redis does not count. An older login lacks rights, also in a script."""
    if isinstance(error, redis.exceptions.NoPermissionError) or "permission" in str(error).lower():
        return "denied"
    return "away" if isinstance(error, redis.ConnectionError | redis.TimeoutError) else "refused"


class RunQuotas:
    """Turns for the calls of one attempt to one resource. Meets schemas.quotas.Quotas."""

    def __init__(
        self,
        shared: SharedQuotas,
        resource_id: UUID,
        kind: str,
        token_of: Callable[[], Callable[[bytes], bytes]],
        *,
        shown: Shown = unseen,
    ) -> None:
        self._shown = shown
        self._shared = shared
        self._resource_id = resource_id
        self._connector = connector_of(kind)
        self._token_of = token_of
        self._keys: dict[Quota, str] = {}

    def take(self, quota: Quota, *, patience: float, ended: Event) -> None:
        """Wait for one call's turn, in place or by a Deferral."""
        key = self._key(quota)
        try:
            waited = in_turn(
                lambda: self._shared.hold(key, quota),
                quota,
                patience=patience,
                ended=ended,
                shown=self._shown,
            )
        except Deferral:
            QUOTA_DEFERRALS.labels(self._connector).inc()
            raise
        if waited:
            QUOTA_WAITS.labels(self._connector).inc()
            QUOTA_WAITED.labels(self._connector).inc(waited)

    def close(self, quota: Quota, seconds: float) -> None:
        """Let no worker call for so many seconds."""
        self._shared.close(self._key(quota), quota, seconds)

    @cached_property
    def _token(self) -> Callable[[bytes], bytes]:
        """What the account's key makes of a value; asked for only where there is a quota."""
        return self._token_of()

    def _key(self, quota: Quota) -> str:
        """Return the quota's key: of its login if that can be told, else of the resource.

        By the account's own key: nobody can tell a login from it, nor that two accounts have one.
        """
        if quota not in self._keys:
            whose = quota.holder or ("resource", str(self._resource_id))
            parts = (quota.provider, quota.name, *whose)
            said = b"syncward/quota/v1" + b"".join(
                b"%d:%b," % (len(part), part) for part in map(str.encode, parts)
            )
            made = self._token(said) if quota.holder else _digest(said)
            self._keys[quota] = f"{NAMESPACE}:quota:{made.decode()}"
        return self._keys[quota]


def _digest(said: bytes) -> bytes:
    return hashlib.sha256(said).hexdigest()[:32].encode()
