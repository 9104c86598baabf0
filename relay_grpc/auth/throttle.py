"""How many wrong credentials are looked at: so many a minute from one peer, and so many for one key. No I/O.

Looking at a credential costs a hash, so it is counted before that, and taken back when the credential turns out right.
Of any 60 seconds none sees more than the limit: the rate limits' window of two buckets would admit twice as many around
a minute's end. It is this process's own, so that it works whatever else is lost.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from relay_grpc import errors

LIMITS = {"peer": 10, "key": 5, "workspace": 10}  # wrong credentials a minute. workspace: one that asks about keys
MINUTE = 60.0
MAX_SUBJECTS = 20_000  # more than a minute's hashes can fill; no new one is admitted beyond


@dataclass(slots=True)
class _Tries:
    """Of one subject. wrong: when each wrong one of the last minute was settled. settled: set when one is."""

    limit: int
    wrong: list[float] = field(default_factory=list)
    under_way: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Attempt:
    """A credential that is being looked at. right: set it when the credential is, or was not looked at after all."""

    right: bool = False


class Throttle:
    """clock: seconds, never going back. A subject is a kind of LIMITS and who of that kind it is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._subjects: OrderedDict[tuple[str, str], _Tries] = OrderedDict()  # the one settled longest ago first

    @asynccontextmanager
    async def attempt(self, subjects: Mapping[str, str]) -> AsyncIterator[Attempt]:
        """Goes around what looks at a credential. Raises Throttled where a subject has had too many wrong ones.

        It waits only while others are under way that, if they all turned out wrong, would be as many as are allowed. So
        right ones are never refused for their number, and wrong ones at one time are not more than one after another.
        What ends by an exception counts as wrong.
        """
        while crowded := self._crowded(subjects):
            await crowded.settled.wait()
        everyone = [self._subjects.setdefault(subject, _Tries(LIMITS[subject[0]])) for subject in subjects.items()]
        for tries in everyone:
            tries.under_way += 1
        attempt = Attempt()
        try:
            yield attempt
        finally:
            for subject, tries in zip(subjects.items(), everyone, strict=True):
                self._settle(subject, tries, right=attempt.right)

    def _crowded(self, subjects: Mapping[str, str]) -> _Tries | None:
        """The subject to wait for, if there is one."""
        now = self._clock()
        self._forget_old(now)
        crowded = None
        for subject in subjects.items():
            tries = self._subjects.get(subject)
            if tries is None:
                if len(self._subjects) >= MAX_SUBJECTS:
                    raise errors.Throttled(MINUTE)
                continue
            while tries.wrong and tries.wrong[0] <= now - MINUTE:
                del tries.wrong[0]
            if len(tries.wrong) >= tries.limit:
                raise errors.Throttled(tries.wrong[0] + MINUTE - now)
            if len(tries.wrong) + tries.under_way >= tries.limit:
                crowded = tries
        return crowded

    def _settle(self, subject: tuple[str, str], tries: _Tries, *, right: bool) -> None:
        tries.under_way -= 1
        if not right:
            tries.wrong.append(self._clock())
            self._subjects.move_to_end(subject)
        elif not tries.wrong and not tries.under_way:
            del self._subjects[subject]
        tries.settled.set()
        tries.settled = asyncio.Event()

    def _forget_old(self, now: float) -> None:
        while self._subjects:
            subject, tries = next(iter(self._subjects.items()))
            if tries.under_way or (tries.wrong and tries.wrong[-1] > now - MINUTE):
                return
            del self._subjects[subject]


def network_of(peer: str) -> str:
    """Whom a wrong credential from this address is counted for: of IPv6 the /64, all of which one host can have."""
    try:
        address = ip_address(peer)
    except ValueError:
        return peer
    return str(ip_network((address.packed, 64), strict=False)) if address.version == 6 else peer
