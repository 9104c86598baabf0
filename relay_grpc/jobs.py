"""Work that goes on beside the calls: jobs, each in a task of its own, so that none waits for or fails with another."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from relay_grpc import errors

log = logging.getLogger(__name__)
Job = tuple[float, Callable[[], Awaitable[None]]]  # the seconds between the end of a run and the next one
SPREAD = 0.1  # of an interval, so that instances which started together don't come together for ever


class Jobs:
    """Started and stopped together.

    jobs: by what they are called in the log.
    """

    def __init__(self, jobs: dict[str, Job]) -> None:
        self._jobs = jobs
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._tasks = {asyncio.create_task(_every(name, *job)) for name, job in self._jobs.items()}

    async def stop(self) -> None:
        tasks = self._tasks
        while tasks:  # a cancellation that meets the end of a connection can be lost in asyncpg
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=1)


async def _every(name: str, seconds: float, job: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await job()
        except errors.RelayError as error:
            log.info("%s waits: %s", name, error)
        except Exception:
            log.exception("%s stumbled", name)
        await asyncio.sleep(seconds * random.uniform(1 - SPREAD, 1 + SPREAD))  # noqa: S311  # not for secrets
