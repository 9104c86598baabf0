"""The arithmetic of the rate limits: a sliding window over two buckets of one minute each. No I/O.

What was spent in the current minute counts in full, what was spent in the previous one by the share of it that still
lies within the last 60 s (the weighting of Cloudflare and Unkey). So an aligned minute never admits more than the
limit, and the second after a full minute admits a sixtieth of it: there is no burst at the boundary.

A call may be charged to several subjects, its workspace and its key: it takes its units from all of them or from none.

Times are whole milliseconds since the epoch, and a share is multiplied out instead of divided, so that window.lua
computes exactly the same. Redis and the process itself are limited by this one algorithm.
"""

from collections.abc import Sequence
from typing import NamedTuple

MINUTE = 60_000


class Window(NamedTuple):
    """Units that one subject spent in `minute`, counted from the epoch, and in the minute before it."""

    minute: int = 0
    current: int = 0
    previous: int = 0


class Charge(NamedTuple):
    """What a call takes from one subject's budget.

    subject: what is limited and whose it is; subjects that are charged together have one {hash tag}, for Redis Cluster.
    cost: at least 0. 0 only reads: it is admitted and changes nothing. More than the limit counts as the limit, so that
        a dear call waits for the whole budget instead of for ever.
    limit: units per minute, at least 0. 0 admits nothing.
    budget, holder: one of BUDGETS and of HOLDERS in budgets.py, for those who are told of it.
    """

    subject: str
    cost: int
    limit: int
    budget: str
    holder: str


class Decision(NamedTuple):
    """Whether a call may go on, and what its caller is told: the numbers of its tightest charge.

    tightest: which one that is, by its place: the one that refuses for longest, or else the one with the least left.
    limit, remaining: units per minute, and how many of them could be spent right now.
    reset_after: seconds until `remaining` grows if nothing more is spent, 0 while it equals `limit`; the parameter t of
        draft-ietf-httpapi-ratelimit-headers-10, which is to be rounded up to whole seconds.
    retry_after: seconds after which the refused call is admitted if nothing else is spent meanwhile; never less than
        `reset_after` nor than 0.001, and 0 for a call that was admitted.
    """

    allowed: bool
    tightest: int
    limit: int
    remaining: int
    reset_after: float
    retry_after: float


def spend(now: int, windows: Sequence[Window], charges: Sequence[Charge]) -> tuple[list[Window], Decision]:
    """Takes the units of every charge, or none of them; returns the windows as they are afterwards.

    windows: of the charges' subjects, one for each.
    """
    moved = [_at(now, window) for window in windows]
    allowed = True
    for window, charge in zip(moved, charges, strict=True):
        if not _affords(now, window, charge):
            allowed = False
    if allowed:
        moved = [
            Window(window.minute, window.current + _units(charge), window.previous)
            for window, charge in zip(moved, charges, strict=True)
        ]
    return moved, decide(now, moved, charges, allowed=allowed)


def decide(now: int, windows: Sequence[Window], charges: Sequence[Charge], *, allowed: bool) -> Decision:
    """Words what `spend` did. windows: as they were left by a spending at `now`, in this process or in Redis."""
    tightest, retry = _least_left(now, windows, charges) if allowed else _longest_refused(now, windows, charges)
    window, limit = windows[tightest], charges[tightest].limit
    remaining = _remaining(now, window, limit)
    reset = _until_free(now, window, remaining + 1, limit) if remaining < limit else 0
    return Decision(allowed, tightest, limit, remaining, reset / 1000, retry / 1000)


def _least_left(now: int, windows: Sequence[Window], charges: Sequence[Charge]) -> tuple[int, int]:
    if len(charges) == 1:
        return 0, 0
    shares = [
        _remaining(now, window, charge.limit) / (charge.limit or 1)
        for window, charge in zip(windows, charges, strict=True)
    ]
    return shares.index(min(shares)), 0


def _longest_refused(now: int, windows: Sequence[Window], charges: Sequence[Charge]) -> tuple[int, int]:
    waits = [
        0 if _affords(now, window, charge) else _until_free(now, window, _units(charge), charge.limit)
        for window, charge in zip(windows, charges, strict=True)
    ]
    return waits.index(max(waits)), max(waits)


def share(window: Window, instances: int) -> Window:
    """What falls to each of so many instances of what all of them spent, rounded up."""
    return Window(window.minute, -(-window.current // instances), -(-window.previous // instances))


def merged(now: int, one: Window, other: Window) -> Window:
    """At least what either of them says was spent, each as far as it still counts at `now`.

    So one that was counted by a clock far ahead doesn't push out the other.
    """
    one, other = _at(now, one), _at(now, other)
    later = max(one.minute, other.minute) * MINUTE
    one, other = _at(later, one), _at(later, other)
    return Window(one.minute, max(one.current, other.current), max(one.previous, other.previous))


def _units(charge: Charge) -> int:
    return charge.cost if charge.cost <= charge.limit else max(charge.limit, 1)


def _affords(now: int, window: Window, charge: Charge) -> bool:
    return charge.cost == 0 or _used(now, window) + _units(charge) * MINUTE <= charge.limit * MINUTE


def _remaining(now: int, window: Window, limit: int) -> int:
    left = limit * MINUTE - _used(now, window)
    return left // MINUTE if left > 0 else 0


def _at(now: int, window: Window) -> Window:
    """Moves the window on to `now`. A clock that stepped back into the previous minute doesn't reopen it."""
    age = now // MINUTE - window.minute
    if age in (-1, 0):
        return window
    return Window(now // MINUTE, 0, window.current if age == 1 else 0)


def _ahead(now: int, window: Window) -> int:
    """The milliseconds that are left of the window's minute."""
    left = (window.minute + 1) * MINUTE - now
    return left if left < MINUTE else MINUTE


def _used(now: int, window: Window) -> int:
    """Units spent within the last 60 s, times MINUTE."""
    return window.current * MINUTE + window.previous * _ahead(now, window)


def _until_free(now: int, window: Window, units: int, limit: int) -> int:
    """The milliseconds until `units`, which are not free now, will be.

    That is `_used(t) + units * MINUTE <= limit * MINUTE`, solved for the first t: it lies in this minute, while
    `previous` fades, or in the next one, while `current` does.
    """
    others = max(0, limit - units) * MINUTE
    spare = others - window.current * MINUTE
    if spare >= 0:
        return _ahead(now, window) - spare // max(window.previous, 1)
    return _ahead(now, window) + MINUTE - others // window.current
