"""A PostgreSQL of a test's own that can be stopped, killed and frozen."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import psutil

from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.schema import migrate


class Postgres:
    """Its URL stays the same, by a link to its socket. durable: whether a crash leaves it all that it committed."""

    def __init__(self, folder: Path, *, durable: bool) -> None:
        self._folder = folder
        self._link = folder / "socket"
        self._server = EmbeddedPostgres(folder / "postgres", durable=durable)
        self.url = f"postgresql://relay@/relay?host={quote(str(self._link), safe='')}&port=5432"

    def start(self) -> None:
        self._server.start()
        self._link.unlink(missing_ok=True)
        self._link.symlink_to(parse_qs(urlsplit(self._server.url()).query)["host"][0])

    def stop(self) -> None:
        self._server.stop()

    def _processes(self) -> list[psutil.Process]:
        """The postmaster and all that it started."""
        pid = int((self._folder / "postgres" / "data" / "postmaster.pid").read_text().splitlines()[0])
        postmaster = psutil.Process(pid)
        return [postmaster, *postmaster.children(recursive=True)]

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self.stop)
        try:
            yield
        finally:
            await asyncio.to_thread(self.start)

    @asynccontextmanager
    async def crashed(self) -> AsyncIterator[None]:
        """As pg_ctl stop -m immediate: every connection is cut, and what was committed is recovered from its log."""
        self._processes()[0].send_signal(signal.SIGQUIT)
        async with self.stopped():
            yield

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        processes = self._processes()
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def private(folder: Path, *, durable: bool) -> AsyncIterator[Postgres]:
    """One with Relay's schema in its database."""
    made = Postgres(folder, durable=durable)
    await asyncio.to_thread(made.start)
    try:
        await asyncio.to_thread(migrate, made.url)
        yield made
    finally:
        await asyncio.to_thread(made.stop)
