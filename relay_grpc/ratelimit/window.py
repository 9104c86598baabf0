"""The arithmetic of the rate limits: a sliding window over two buckets of one minute each. No I/O.

What was spent in the current minute counts in full, what was spent in the previous one by the share of it that still
lies within the last 60 s (the weighting of Cloudflare and Unkey). So an aligned minute never admits more than the
limit, and the second after a full minute admits a sixtieth of it: there is no burst at the boundary.

Times are whole milliseconds since the epoch, and a share is multiplied out instead of divided, so that window.lua
computes exactly the same. Redis and the process itself are limited by this one algorithm.
"""

from dataclasses import dataclass

MINUTE = 60_000


@dataclass(frozen=True, slots=True)
class Window:
    """Units that one subject spent in `minute`, counted from the epoch, and in the minute before it."""

    minute: int = 0
    current: int = 0
    previous: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a request may go on, and what its caller is told.

    limit, remaining: units per minute, and how many of them could be spent right now.
    reset_after: seconds until `remaining` grows if nothing more is spent, 0 while it equals `limit`; the parameter t of
        draft-ietf-httpapi-ratelimit-headers-10, which is to be rounded up to whole seconds.
    retry_after: seconds after which the refused request is admitted if nothing else is spent meanwhile; never less than
        `reset_after` nor than 0.001, and 0 for a request that was admitted.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_after: float
    retry_after: float


def spend(now: int, window: Window, cost: int, limit: int) -> tuple[Window, Decision]:
    """Takes `cost` units out of `limit` per minute, or none of them; returns the window as it is afterwards.

    cost: at least 0. 0 only reads: it is admitted and changes nothing. More than the limit counts as the limit, so that
        a dear request waits for the whole budget instead of for ever.
    limit: at least 0. 0 admits nothing.
    """
    window = _at(now, window)
    cost = min(cost, max(limit, 1))
    allowed = cost == 0 or _used(now, window) + cost * MINUTE <= limit * MINUTE
    if allowed:
        window = Window(window.minute, window.current + cost, window.previous)
    return window, decide(now, window, cost, limit, allowed=allowed)


def decide(now: int, window: Window, cost: int, limit: int, *, allowed: bool) -> Decision:
    """Words what `spend` did. window: as it was left by a spending at `now`, in this process or in Redis."""
    remaining = max(0, limit * MINUTE - _used(now, window)) // MINUTE
    reset = _until_free(now, window, remaining + 1, limit) if remaining < limit else 0
    retry = 0 if allowed else _until_free(now, window, cost, limit)
    return Decision(allowed, limit, remaining, reset / 1000, retry / 1000)


def _at(now: int, window: Window) -> Window:
    """Moves the window on to `now`. A clock that stepped back into the previous minute doesn't reopen it."""
    age = now // MINUTE - window.minute
    if age in (-1, 0):
        return window
    return Window(now // MINUTE, 0, window.current if age == 1 else 0)


def _elapsed(now: int, window: Window) -> int:
    return max(0, now - window.minute * MINUTE)


def _used(now: int, window: Window) -> int:
    """Units spent within the last 60 s, times MINUTE."""
    return window.current * MINUTE + window.previous * (MINUTE - _elapsed(now, window))


def _until_free(now: int, window: Window, units: int, limit: int) -> int:
    """The milliseconds until `units`, which are not free now, will be.

    That is `_used(t) + units * MINUTE <= limit * MINUTE`, solved for the first t: it lies in this minute, while
    `previous` fades, or in the next one, while `current` does.
    """
    others = max(0, limit - units) * MINUTE
    spare = others - window.current * MINUTE
    if spare >= 0:
        return MINUTE - spare // max(window.previous, 1) - _elapsed(now, window)
    return 2 * MINUTE - others // window.current - _elapsed(now, window)
