"""One Redis server behind one connection, on which concurrent requests travel together."""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from typing import Any

from redis.exceptions import AskError, ClusterDownError, NoScriptError, RedisError, TryAgainError
from redis.exceptions import ConnectionError as NotConnected

CONNECT_TIMEOUT = 1.0  # seconds for TCP, TLS and AUTH; no call waits that long
RECONNECT_INTERVAL = 0.5  # seconds
TIMEOUT_SLICES = 4
BATCH = 256  # commands in a round trip: about 3 ms of the server's time, so that a timeout of tens of ms means a loss

SCRIPT = files(__package__).joinpath("window.lua").read_text()
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
KEY_PREFIX = "relay:limit:"
# Leaves the script with the server, and writes, so that one that is read-only, full or loading doesn't count as back.
PROBE = ("EVAL", SCRIPT, 1, f"{KEY_PREFIX}probe", 1, 1_000_000_000)
OF_ONE_COMMAND = (NoScriptError, AskError, TryAgainError, ClusterDownError)  # any other error is the whole server's

Command = tuple[str | int, ...]
Request = tuple[Command, asyncio.Future[list[int]]]

logger = logging.getLogger(__name__)


class Node:
    """A server that is connected to by itself, again and again while it is lost.

    What is asked while a round trip is under way leaves with the next one: there is no timer and no waiting to fill.
    connection: of redis-py, not connected yet. back: called whenever the server begins to answer.
    Construct it in a running event loop, and close it.
    """

    def __init__(self, connection: Any, answer_timeout: float, back: Callable[[], None]) -> None:
        self.up = False
        self._connection = connection
        self._answer_timeout = answer_timeout
        self._back = back
        self._name = getattr(connection, "path", None) or f"{connection.host}:{connection.port}"
        self._waiting: list[Request] = []  # unanswered, those under way first
        self._asked = asyncio.Event()
        self._tried = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def run_script(self, keys: list[str], arguments: list[int]) -> list[int]:
        """What window.lua returns, within the answer timeout; at once where the server is lost.

        Raises MovedError where a cluster keeps the keys elsewhere, any other RedisError where there is no answer.
        """
        if not self._tried.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._answer_timeout):
                    await self._tried.wait()
            self._tried.set()  # the next ones don't wait
        if not self.up:
            raise NotConnected
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((("EVALSHA", SCRIPT_SHA, len(keys), *keys, *arguments), future))
        self._asked.set()
        return await future

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._lose()

    async def _run(self) -> None:
        told = False
        while True:
            try:
                await self._connect()
                if told:
                    logger.info("Redis at %s is back, limits are shared by all instances", self._name)
                told = False
                await self._serve()
            except Exception as error:  # whatever it is: no call may be left waiting
                if not told:
                    why = str(error) or type(error).__name__
                    logger.warning(
                        "Redis at %s is lost: each instance counts the limits by itself (%s)", self._name, why
                    )
                told = True
                await self._lose()
            await asyncio.sleep(RECONNECT_INTERVAL)

    async def _connect(self) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await self._connection.connect()
        await self._exchange([PROBE])
        self.up = True
        self._tried.set()
        self._back()

    async def _lose(self) -> None:
        self.up = False
        self._tried.set()
        unanswered, self._waiting = self._waiting, []
        for _, future in unanswered:
            if not future.done():
                future.set_exception(NotConnected())
        await self._connection.disconnect(nowait=True)

    async def _serve(self) -> None:
        """Answers until something fails."""
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
            elif isinstance(reply, RedisError):
                future.set_exception(reply)
            else:
                future.set_result(reply)
        self._waiting[: len(batch)] = again

    async def _exchange(self, commands: list[Command]) -> list[Any]:
        """One round trip.

        Its time is taken in slices, each of which lets the event loop look for the answer: where a burst of calls holds
        this process up, an answer that has come is found before it counts as late.
        """
        pipeline = asyncio.create_task(self._pipeline(commands))
        await asyncio.sleep(0)  # time counts from when it has sent them, not from when this process gets round to it
        try:
            for _ in range(TIMEOUT_SLICES):
                await asyncio.wait({pipeline}, timeout=self._answer_timeout / TIMEOUT_SLICES)
                if pipeline.done():
                    return pipeline.result()
            raise TimeoutError(f"no answer within {self._answer_timeout * 1000:.0f} ms")
        finally:
            pipeline.cancel()

    async def _pipeline(self, commands: list[Command]) -> list[Any]:
        await self._connection.send_packed_command(self._connection.pack_commands(commands))
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await self._connection.read_response())
            except OF_ONE_COMMAND as error:
                replies.append(error)
        return replies
