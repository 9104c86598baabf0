from collections.abc import Iterator

import pytest

from tests.ratelimit.spending import new_subject
from tests.valkey import Valkey, running


@pytest.fixture
def subject() -> str:
    return new_subject()


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """A server for tests that leave it running and use subjects of their own."""
    with running() as server:
        yield server


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A server for one test to kill, freeze or empty."""
    with running() as server:
        yield server
