"""Who counts the budgets: Redis for all instances together, or this process by itself where Redis is absent or lost."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from typing import Any, Protocol

from redis.asyncio import Connection
from redis.asyncio.connection import parse_url
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, NoScriptError, RedisError
from redis.exceptions import ConnectionError as NotConnected

from relay_grpc.ratelimit.window import MINUTE, Decision, Window, decide, spend

ANSWER_TIMEOUT = 0.05  # seconds that a lost or frozen Redis may cost a call
CONNECT_TIMEOUT = 1.0  # seconds for TCP, TLS and AUTH; no call waits for them beyond ANSWER_TIMEOUT
RECONNECT_INTERVAL = 0.5  # seconds
BATCH = 256  # commands in a round trip: about 3 ms of the server's time, so that ANSWER_TIMEOUT means what it says

SCRIPT = files(__package__).joinpath("window.lua").read_text()
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
KEY_PREFIX = "relay:limit:"
# Leaves the script with the server, and writes, so that one that is read-only, full or loading doesn't count as back.
PROBE = ("EVAL", SCRIPT, 1, f"{KEY_PREFIX}probe", 1, 1_000_000_000)

# Over what the URL says. The timeouts are kept here: redis-py would set a timer for every command.
OPTIONS = {"protocol": 2, "driver_info": None, "socket_timeout": None, "socket_connect_timeout": None}

Command = tuple[str | int, ...]
Request = tuple[Command, asyncio.Future[list[int]]]

logger = logging.getLogger(__name__)


class Limiter(Protocol):
    """Counts what each subject spends per minute. tests/ratelimit/test_limiter.py is the contract."""

    degraded: bool
    """Whether the latest decision was made without the Redis that there should be."""

    async def spend(self, subject: str, cost: int, limit: int) -> Decision:
        """Takes `cost` units from the subject's `limit` per minute, or refuses; cost 0 reads the numbers. Never raises.

        subject: what is limited and whose it is, such as "executions:WORKSPACE_ID". cost, limit: see window.spend.
        """

    async def close(self) -> None:
        """Ends the limiter's connections. It must not be used afterwards."""


class LocalLimiter:
    """Counts in this process, which grants its share of each limit: limit / instances, at least one unit.

    It uses the window that Redis uses, and not a token bucket: one behaviour, and no burst on top of the limit.
    instances: how many instances of Relay are alive. clock: seconds since the epoch.
    A subject is forgotten after a minute of rest, so the memory follows the subjects of the last two minutes.
    """

    degraded = False

    def __init__(self, instances: Callable[[], int] = lambda: 1, clock: Callable[[], float] = time.time) -> None:
        self._instances = instances
        self._clock = clock
        self._minute = 0
        self._recent: dict[str, Window] = {}  # seen in this minute
        self._older: dict[str, Window] = {}  # not since the minute before

    async def spend(self, subject: str, cost: int, limit: int) -> Decision:
        now = int(self._clock() * 1000)
        if now // MINUTE != self._minute:
            self._minute, self._recent, self._older = now // MINUTE, {}, self._recent
        before = self._recent.get(subject) or self._older.get(subject) or Window()
        share = min(limit, max(1, limit // max(1, self._instances())))
        self._recent[subject], decision = spend(now, before, cost, share)
        return decision

    async def close(self) -> None:
        pass


class RedisLimiter:
    """Counts in Redis 5 or later, Valkey, or a cluster of either, for all instances together.

    While Redis is lost or frozen `fallback` decides, so that no limit is ever lifted; Redis is tried again by itself.
    Only the calls that are under way when Redis is lost wait for it, and for `answer_timeout` seconds at most.
    Construct it in a running event loop. A Redis that can't be reached is logged; a URL that can't be read raises
    ValueError, whose text doesn't repeat the URL, for its password.
    """

    def __init__(self, url: str, fallback: LocalLimiter, answer_timeout: float = ANSWER_TIMEOUT) -> None:
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
        self._seed = _Node(connection, answer_timeout)
        self._nodes: dict[tuple[str, int], _Node] = {}  # of a cluster; one that leaves it is tried until the restart
        self._owners: dict[int, _Node] = {}  # of the slots of a cluster
        self.degraded = False

    async def spend(self, subject: str, cost: int, limit: int) -> Decision:
        try:
            now, minute, current, previous, allowed = await self._run_script(KEY_PREFIX + subject, cost, limit)
        except RedisError:
            self.degraded = True
            return await self._fallback.spend(subject, cost, limit)
        self.degraded = False
        return decide(now, Window(minute, current, previous), cost, limit, allowed=bool(allowed))

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in (self._seed, *self._nodes.values())))

    async def _run_script(self, key: str, cost: int, limit: int) -> list[int]:
        command = ("EVALSHA", SCRIPT_SHA, 1, key, cost, limit)
        slot = key_slot(key.encode())
        try:
            return await self._owners.get(slot, self._seed).ask(command)
        except MovedError as moved:
            if "path" in self._options:
                raise  # a cluster is not reached by a unix socket
            owner = self._owners[slot] = self._node(moved.host or self._options.get("host", "localhost"), moved.port)
            return await owner.ask(command)
        except RedisError:
            self._owners.pop(slot, None)  # the seed knows who took the slot over
            raise

    def _node(self, host: str, port: int) -> "_Node":
        if (host, port) not in self._nodes:
            connection = self._connection_class(**{**self._options, "host": host, "port": port})
            self._nodes[host, port] = _Node(connection, self._answer_timeout)
        return self._nodes[host, port]


class _Node:
    """One server behind one connection, on which concurrent requests travel together.

    What is asked while a round trip is under way leaves with the next one: there is no timer and no waiting to fill.
    """

    def __init__(self, connection: Any, answer_timeout: float) -> None:
        self._connection = connection
        self._answer_timeout = answer_timeout
        self._name = getattr(connection, "path", None) or f"{connection.host}:{connection.port}"
        self._waiting: list[Request] = []  # unanswered, those under way first
        self._asked = asyncio.Event()
        self._tried = asyncio.Event()
        self._lost = False
        self._task = asyncio.create_task(self._run())

    async def ask(self, command: Command) -> list[int]:
        """Raises MovedError where a cluster keeps the key elsewhere, any other RedisError where there is no answer."""
        if not self._tried.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._answer_timeout):
                    await self._tried.wait()
        if self._lost or not self._tried.is_set():
            raise NotConnected
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        self._asked.set()
        return await future

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._lose()

    async def _run(self) -> None:
        while True:
            try:
                await self._serve()
            except Exception as error:  # whatever it is: no call may be left waiting
                if not self._lost:
                    logger.warning(
                        "Redis at %s is lost: each instance counts the limits by itself (%r)", self._name, error
                    )
                await self._lose()
            await asyncio.sleep(RECONNECT_INTERVAL)

    async def _lose(self) -> None:
        self._lost = True
        self._tried.set()
        unanswered, self._waiting = self._waiting, []
        for _, future in unanswered:
            if not future.done():
                future.set_exception(NotConnected())
        await self._connection.disconnect(nowait=True)

    async def _serve(self) -> None:
        """Connects and answers until something fails."""
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await self._connection.connect()
        await self._exchange([PROBE])
        if self._lost:
            logger.info("Redis at %s is back, limits are shared by all instances", self._name)
        self._lost = False
        self._tried.set()
        while True:
            await self._asked.wait()
            self._asked.clear()
            while self._waiting:
                await self._answer(self._waiting[:BATCH])

    async def _answer(self, batch: list[Request]) -> None:
        replies = await self._exchange([command for command, _ in batch])
        again: list[Request] = []
        for (command, future), reply in zip(batch, replies, strict=True):
            if isinstance(reply, NoScriptError):
                again.append((("EVAL", SCRIPT, *command[2:]), future))
            elif future.done():  # its caller has gone
                continue
            elif isinstance(reply, AskError):
                future.set_exception(reply)
            else:
                future.set_result(reply)
        self._waiting[: len(batch)] = again

    async def _exchange(self, commands: list[Command]) -> list[Any]:
        """One round trip."""
        pipeline = asyncio.create_task(self._pipeline(commands))
        try:
            # asyncio.timeout() would also fire where the answer came in time and it was this process that was held up.
            await asyncio.wait({pipeline}, timeout=self._answer_timeout)
            if not pipeline.done():
                raise TimeoutError(f"no answer within {self._answer_timeout * 1000:.0f} ms")
            return pipeline.result()
        finally:
            pipeline.cancel()

    async def _pipeline(self, commands: list[Command]) -> list[Any]:
        await self._connection.send_packed_command(self._connection.pack_commands(commands))
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await self._connection.read_response())
            except (NoScriptError, AskError) as error:  # concerns one command; any other error the whole server
                replies.append(error)
        return replies
