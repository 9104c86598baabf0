from collections.abc import AsyncIterator

import pytest

from tests.actions.caller import Caller, calling
from tests.harness import Receiver, Relay


@pytest.fixture
async def caller(relay: Relay, receiver: Receiver) -> AsyncIterator[Caller]:
    async with calling(relay, receiver) as made:
        yield made
