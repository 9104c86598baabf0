"""`relay serve` as a process of its own, on a database of the test's: several of them are several instances."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from tests.actions.caller import eventually

ROOT = Path(__file__).parents[1]
SERVES = re.compile(r"serves gRPC on (\S+) and HTTP on (\S+)\.")


@asynccontextmanager
async def served(
    url: str, folder: Path, *, module: str = "relay_grpc", **environ: str
) -> AsyncIterator[tuple[str, str]]:
    """Where it serves gRPC and where HTTP, as HOST:PORT.

    folder: the data folder, whose key material instances share; what it says is in *.log there. Limits are out of the
    way where none are told. module: what runs in place of `relay`.
    """
    log = folder / f"{uuid4()}.log"
    settings = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": url,
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
        yield addresses[1], addresses[2]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()
