from collections.abc import AsyncIterator

import pytest

from tests.harness import Relay
from tests.rpc.wire import Wire, wired


@pytest.fixture(scope="module")
async def wire(relay: Relay) -> AsyncIterator[Wire]:
    """A connection of the tenant's admin."""
    async with wired(relay) as wire:
        yield wire
