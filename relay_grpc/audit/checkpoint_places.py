"""Where checkpoints are published, outside the database: a folder, or an HTTP server."""

import asyncio
import os
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar
from uuid import UUID

import aiohttp

from relay_grpc.actions.destinations import EgressRefused, InvalidUrlError
from relay_grpc.actions.egress import Egress
from relay_grpc.audit.checkpoint import stated

PUSH_SECONDS = 10.0
THREADS = 4
P = ParamSpec("P")
T = TypeVar("T")
Head = tuple[int, bytes]  # the size and the root of a log


class UnpublishedError(Exception):
    """A checkpoint can't be read from or brought to its place; the text tells the operator why."""


class Place(Protocol):
    """Where the newest checkpoint of each log is."""

    async def logs(self) -> Collection[UUID]:
        """Those of which there is one. Raises UnpublishedError."""

    async def held(self, workspace_id: UUID) -> Head | None:
        """What is published of a log, which the next one has to continue. Raises UnpublishedError."""

    async def put(self, workspace_id: UUID, head: Head, note: str) -> None:
        """Publishes, in bounded time. Raises UnpublishedError."""


class Folder:
    """A file for each log, which is named as its workspace: replaced whole, and on the disk before it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(THREADS, "checkpoints")

    async def logs(self) -> Collection[UUID]:
        return await self._in_thread(self._logs)

    async def held(self, workspace_id: UUID) -> Head | None:
        return await self._in_thread(self._held, workspace_id)

    async def put(self, workspace_id: UUID, head: Head, note: str) -> None:
        await self._in_thread(self._put, workspace_id, note)

    async def _in_thread(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In one of its own: where the disk is another machine's and hangs, the threads of all else must not."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(do, *args, **kwargs))

    def _logs(self) -> Collection[UUID]:
        found = set()
        try:
            for path in self._path.iterdir() if self._path.exists() else ():
                with suppress(ValueError):  # a file of somebody else's
                    found.add(UUID(path.name))
        except OSError as error:
            raise self._unusable(error) from error
        return found

    def _held(self, workspace_id: UUID) -> Head | None:
        path = self._path / str(workspace_id)
        try:
            return stated(path.read_text(), workspace_id)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UnpublishedError(f"{path} is damaged: {error}; find out who wrote it, and move it away") from error
        except OSError as error:
            raise self._unusable(error) from error

    def _put(self, workspace_id: UUID, note: str) -> None:
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{workspace_id}.", dir=self._path)
            try:
                with open(handle, "w") as file:
                    file.write(note)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(name, self._path / str(workspace_id))
            except OSError:
                os.unlink(name)
                raise
            directory = os.open(self._path, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UnpublishedError:
        return UnpublishedError(f"can't use {self._path}: {error.strerror}")


class Receiver:
    """An HTTP server of the operator's own, which takes notes by POST and keeps them. What it has is known from here.

    So an instance that starts publishes what it finds, and the receiver is who compares that with what it had before.
    """

    def __init__(self, url: str, egress: Egress) -> None:
        self._url = url
        self._egress = egress
        self._held: dict[UUID, Head] = {}

    async def logs(self) -> Collection[UUID]:
        return self._held.keys()

    async def held(self, workspace_id: UUID) -> Head | None:
        return self._held.get(workspace_id)

    async def put(self, workspace_id: UUID, head: Head, note: str) -> None:
        headers = {"content-type": "text/plain; charset=utf-8"}
        try:
            async with (
                asyncio.timeout(PUSH_SECONDS),
                self._egress.request("POST", self._url, body=note.encode(), headers=headers) as response,
            ):
                if not 200 <= response.status < 300:
                    raise UnpublishedError(f"RELAY_AUDIT_CHECKPOINTS answered {response.status}")
        except (aiohttp.ClientError, EgressRefused, InvalidUrlError, OSError, TimeoutError) as error:
            # Nothing of the URL is told, which may hold a secret.
            raise UnpublishedError(f"RELAY_AUDIT_CHECKPOINTS can't be reached: {type(error).__name__}") from error
        self._held[workspace_id] = head
