"""A way to PostgreSQL on which answers get lost: what was asked is done, and nobody hears of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit


@dataclass
class Lossy:
    """url: of the database, by this way. marker: in the transaction whose answer is lost, None for none.

    end: what ends that transaction; empty: the statement with the marker does. patient: whether the connection is cut
    when PostgreSQL has answered, or else at once, while it still works. lost: how many connections were cut.
    """

    socket: str
    url: str = ""
    marker: bytes | None = None
    end: bytes = b""
    patient: bool = True
    lost: int = 0
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def lose(self, marker: str, *, end: str = "", patient: bool) -> None:
        self.marker, self.end, self.patient, self.lost = marker.encode(), end.encode(), patient, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, sender = await asyncio.open_unix_connection(self.socket)
        self._writers += [writer, sender]
        mute = asyncio.Event()

        async def answers() -> None:
            while data := await upstream.read(65536):
                if mute.is_set():
                    writer.close()
                else:
                    writer.write(data)
            writer.close()

        answering = asyncio.create_task(answers())
        marked = False
        try:
            while data := await reader.read(65536):
                marked = marked or (self.marker is not None and self.marker in data)
                if marked and self.end in data:
                    self.marker, marked, self.lost = None, False, self.lost + 1
                    mute.set()
                sender.write(data)
                if mute.is_set() and not self.patient:
                    writer.close()
                    break
        except ConnectionError:
            pass  # it was killed, which PostgreSQL is to hear of
        if not mute.is_set():
            sender.close()
        await asyncio.gather(answering, return_exceptions=True)


@asynccontextmanager
async def lossy(url: str) -> AsyncIterator[Lossy]:
    """url: of a PostgreSQL behind a Unix socket."""
    parts, query = urlsplit(url), parse_qs(urlsplit(url).query)
    way = Lossy(f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}")
    async with await asyncio.start_server(way.serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        way.url = f"postgresql://{parts.username}@{host}:{port}{parts.path}"
        yield way
        for writer in way._writers:
            writer.close()
