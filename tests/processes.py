"""`relay serve` as a process of its own, on a database of the test's: several of them are several instances."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from tests.actions.caller import eventually

ROOT = Path(__file__).parents[1]
SERVES = re.compile(r"serves gRPC on (\S+) and HTTP on (\S+)\.")


@dataclass(frozen=True)
class Server:
    """A server process. listen, http_listen: HOST:PORT. log: what it says."""

    process: asyncio.subprocess.Process
    listen: str
    http_listen: str
    log: Path

    def kill(self) -> None:
        """As kill -9 does, at once."""
        self.process.kill()

    def thaw(self) -> None:
        """Ends what SIGSTOP began."""
        self.process.send_signal(signal.SIGCONT)

    def stands_still(self) -> bool:
        return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED


@asynccontextmanager
async def started(url: str, folder: Path, *, module: str = "relay_grpc", **environ: str) -> AsyncIterator[Server]:
    """A server that serves already. In the end it is told to stop, unless it is gone.

    url: empty for an embedded PostgreSQL. folder: the data folder, whose key material instances share; what it says is
    in *.log there. Limits are out of the way where none are told. module: what runs in place of `relay`.
    """
    log = folder / f"{uuid4()}.log"
    settings = {
        "PATH": os.environ["PATH"],
        **({"DATABASE_URL": url} if url else {}),
        "RELAY_ENV": "development",
        "RELAY_DATA_DIR": str(folder),
        "RELAY_LISTEN": "127.0.0.1:0",
        "RELAY_HTTP_LISTEN": "127.0.0.1:0",
        "RELAY_SHUTDOWN_GRACE": "1",
        "RATE_LIMIT_EXEC_PER_MIN": "1000000",
        "RELAY_RATE_LIMIT_CALLS_PER_MIN": "1000000",
        **environ,
    }
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, "serve", stderr=output, cwd=ROOT, env=settings
        )
    try:
        addresses = await eventually(lambda: SERVES.search(log.read_text()) or process.returncode is not None)
        assert isinstance(addresses, re.Match), log.read_text()
        yield Server(process, addresses[1], addresses[2], log)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)  # it may stand still
        await process.wait()


@asynccontextmanager
async def served(
    url: str, folder: Path, *, module: str = "relay_grpc", **environ: str
) -> AsyncIterator[tuple[str, str]]:
    """Where a server process serves gRPC and where HTTP, as HOST:PORT. The rest as `started`."""
    async with started(url, folder, module=module, **environ) as server:
        yield server.listen, server.http_listen
