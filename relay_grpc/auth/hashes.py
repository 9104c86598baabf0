"""Argon2 off the event loop: few threads, a short queue, and a throttle in front of it."""

import asyncio
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from relay_grpc import errors
from relay_grpc.auth.proofs import HASHER, Peppers, SealedKey, matches
from relay_grpc.auth.throttle import Throttle
from relay_grpc.telemetry import Metrics

HASH_THREADS = 2
MAX_WAITING_HASHES = 64


class Hashes:
    """One per process; close it."""

    def __init__(self, metrics: Metrics) -> None:
        self._threads = ThreadPoolExecutor(HASH_THREADS, "argon2")
        self._throttle = Throttle()
        self._metrics = metrics
        self._waiting = 0
        self._nobody = HASHER.hash(secrets.token_bytes(32))

    async def match(self, key_hash: str | None, presented: str, subjects: Mapping[str, str]) -> bool:
        """Whether the hash is the key's, after exactly one hash.

        key_hash: None where there is no such key; the time to find out is the same. subjects: whom a wrong key is
        counted for, as the throttle says. Raises Throttled and Overloaded.
        """
        async with self._throttle.attempt(subjects) as attempt:
            if self._waiting >= MAX_WAITING_HASHES:
                attempt.right = True  # nobody looked
                raise errors.Overloaded("too many new keys at once; try again")
            self._waiting += 1
            try:
                attempt.right = await asyncio.get_running_loop().run_in_executor(
                    self._threads, matches, key_hash or self._nobody, presented
                )
            finally:
                self._waiting -= 1
                self._metrics.key_hashes.inc()
            return attempt.right

    async def seal(self, peppers: Peppers, key_text: str) -> SealedKey:
        return await asyncio.get_running_loop().run_in_executor(self._threads, peppers.seal, key_text)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
