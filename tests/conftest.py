"""What every test may ask for: a Postgres, databases, a running Relay, a receiver, and how much it may take."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.schema import migrate
from tests.harness import TEMPLATE, Databases, Receiver, Relay, receiving, running, settings_for

FIGURES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long with their full counts")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether tests marked long take their full counts, in minutes, instead of those for every run, in seconds."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what a test measured, in the summary of the run."""
    figures = request.config.stash.setdefault(FIGURES, [])
    return lambda text: figures.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash.get(FIGURES, []):
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """One real PostgreSQL for the whole run, without fsync."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # where root can't enter a user namespace, the server runs as nobody
        with EmbeddedPostgres(Path(folder, "postgres"), durable=False) as server:
            yield server


@pytest.fixture(scope="session")
def databases(postgres: EmbeddedPostgres) -> Databases:
    async def make_template() -> None:
        admin = await asyncpg.connect(postgres.url())
        await admin.execute(f"CREATE DATABASE {TEMPLATE}")
        await admin.close()

    asyncio.run(make_template())
    migrate(postgres.url(TEMPLATE))
    return Databases(postgres)


@pytest.fixture(scope="module")
async def relay(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relay]:
    """A running Relay, shared by the tests of a file."""
    async with databases.new() as url, running(url, settings_for(tmp_path_factory.mktemp("data"))) as server:
        yield server


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as server:
        yield server


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"
