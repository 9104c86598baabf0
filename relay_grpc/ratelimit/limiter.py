"""Who counts the budgets: Redis for all instances together, or this process by itself where Redis is absent or lost."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from redis.asyncio import Connection
from redis.asyncio.connection import parse_url
from redis.crc import key_slot
from redis.exceptions import MovedError, RedisError

from relay_grpc.ratelimit.node import KEY_PREFIX, Node
from relay_grpc.ratelimit.window import Charge, Decision, Window, decide, merged, share, spend

UNUSED = Window()

# Over what the URL says. The timeouts are kept here: redis-py would set a timer for every command.
OPTIONS = {"protocol": 2, "driver_info": None, "socket_timeout": None, "socket_connect_timeout": None}


class Limiter(Protocol):
    """Counts what each subject spends per minute. tests/ratelimit/test_limiter.py is the contract."""

    degraded: bool
    """Whether the latest decision was made without the Redis that there should be, and Redis is not back since."""

    async def spend(self, charges: Sequence[Charge]) -> Decision:
        """Takes the units of every charge, or refuses and takes none. Never raises.

        charges: one or more, of different subjects with one hash tag. A cost of 0 reads the numbers.
        """

    async def close(self) -> None:
        """Ends the limiter's connections. It must not be used afterwards."""


class LocalLimiter:
    """Counts in this process, which grants its share of each limit: limit / instances.

    A share is at least one unit, so that nobody is locked out: of a limit below the number of instances, as many units
    are granted as there are instances. The window is the one of Redis and not a token bucket: one behaviour, and no
    burst on top of the limit.
    instances: how many instances of Relay are alive. clock: seconds since the epoch.
    A subject is forgotten after a minute of rest, so the memory follows the subjects of the last two minutes.
    """

    degraded = False

    def __init__(self, instances: Callable[[], int] = lambda: 1, clock: Callable[[], float] = time.time) -> None:
        self._instances = instances
        self._clock = clock
        self._spent = _Windows()  # here
        self._noted = _Windows()  # by all instances together

    async def spend(self, charges: Sequence[Charge]) -> Decision:
        instances = max(1, self._instances())
        if instances > 1:
            charges = [charge._replace(limit=_limit(charge.limit, instances)) for charge in charges]
        now = int(self._clock() * 1000)
        before = [self._window(now, charge.subject, instances) for charge in charges]
        after, decision = spend(now, before, charges)
        for charge, window in zip(charges, after, strict=True):
            self._spent.keep(charge.subject, window)
        return decision

    def note(self, charges: Sequence[Charge], windows: Sequence[Window]) -> None:
        """Notes what all instances spent, as Redis told it: if it is lost, it is what is left that they share."""
        for charge, window in zip(charges, windows, strict=True):
            self._noted.keep(charge.subject, window)

    async def close(self) -> None:
        pass

    def _window(self, now: int, subject: str, instances: int) -> Window:
        spent, noted = self._spent.of(subject), self._noted.of(subject)
        return spent if noted is UNUSED else merged(now, spent, share(noted, instances))


class _Windows:
    """The windows of the subjects that were seen in this minute or the one before; the others are forgotten."""

    def __init__(self) -> None:
        self._minute = 0
        self._recent: dict[str, Window] = {}  # seen in this minute
        self._older: dict[str, Window] = {}  # not since the minute before

    def of(self, subject: str) -> Window:
        return self._recent.get(subject) or self._older.get(subject, UNUSED)

    def keep(self, subject: str, window: Window) -> None:
        if window.minute - self._minute not in (-1, 0):  # a clock that steps back over the boundary makes no new minute
            self._minute, self._recent, self._older = window.minute, {}, self._recent
        self._recent[subject] = window


def _limit(limit: int, instances: int) -> int:
    return min(limit, max(1, limit // instances))


class RedisLimiter:
    """Counts in Redis 5 or later, Valkey, or a cluster of either, for all instances together.

    While Redis is lost or frozen `fallback` decides, from what Redis said last: no limit is ever lifted, and no
    instance grants its share of it anew. Redis is tried again by itself, and is not told what was granted meanwhile.
    Only the calls that are under way when Redis is lost wait for it, and for `answer_timeout` seconds at most.
    Construct it in a running event loop. A Redis that can't be reached is logged; a URL that can't be read raises
    ValueError, whose text doesn't repeat the URL, for its password.
    """

    def __init__(self, url: str, fallback: LocalLimiter, answer_timeout: float) -> None:
        try:
            self._options: dict[str, Any] = {**parse_url(url), **OPTIONS}
            self._connection_class = self._options.pop("connection_class", Connection)
            connection = self._connection_class(**self._options)
        except (ValueError, TypeError, RedisError):
            raise ValueError(
                "REDIS_URL can't be read: write redis://[user:password@]host[:port][/database], rediss:// for TLS or "
                "unix:///path, with the special characters of the password percent-encoded"
            ) from None
        self._fallback = fallback
        self._answer_timeout = answer_timeout
        self._seed = Node(connection, answer_timeout, self._back)
        address = (self._options.get("host", "localhost"), self._options.get("port", 6379))
        self._nodes = {address: self._seed}  # more of them in a cluster; one that leaves it is tried until the restart
        self._owners: dict[int, Node] = {}  # of the slots of a cluster
        self.degraded = False

    async def spend(self, charges: Sequence[Charge]) -> Decision:
        keys = [KEY_PREFIX + charge.subject for charge in charges]
        arguments = [number for charge in charges for number in (charge.cost, charge.limit)]
        try:
            now, allowed, *numbers = await self._run_script(keys, arguments)
        except RedisError:
            self.degraded = True
            return await self._fallback.spend(charges)
        self.degraded = False
        windows = [Window(*numbers[at : at + 3]) for at in range(0, len(numbers), 3)]
        self._fallback.note(charges, windows)
        return decide(now, windows, charges, allowed=bool(allowed))

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    async def _run_script(self, keys: list[str], arguments: list[int]) -> list[int]:
        slot = key_slot(keys[0].encode())
        try:
            return await (self._owners.get(slot) or self._entry()).run_script(keys, arguments)
        except MovedError as moved:
            if "path" in self._options:
                raise  # a cluster is not reached by a unix socket
            owner = self._owners[slot] = self._node(moved.host or self._options.get("host", "localhost"), moved.port)
            return await owner.run_script(keys, arguments)
        except RedisError:
            self._owners.pop(slot, None)  # the others know who took the slot over
            raise

    def _entry(self) -> Node:
        """Whom to ask for a slot: the seed, or while it is lost any other node, for each knows them all."""
        if self._seed.up:
            return self._seed
        return next((node for node in self._nodes.values() if node.up), self._seed)

    def _node(self, host: str, port: int) -> Node:
        if (host, port) not in self._nodes:
            connection = self._connection_class(**{**self._options, "host": host, "port": port})
            self._nodes[host, port] = Node(connection, self._answer_timeout, self._back)
        return self._nodes[host, port]

    def _back(self) -> None:
        self.degraded = False
