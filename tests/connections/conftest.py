from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.harness import Relay


@pytest.fixture
async def admin(relay: Relay) -> AsyncIterator[Any]:
    """A client of relay.aio, as the tenant's admin."""
    async with relay.connect(relay.tenant.admin) as client:
        yield client
