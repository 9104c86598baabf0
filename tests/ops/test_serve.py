"""`relay serve` and `relay demo` as an operator meets them: real processes, in a data folder with an awkward name."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from relay.client import connect

PATIENCE = 60.0  # seconds; these machines are slow at times
SERVES = re.compile(r"serves gRPC on (\S+?) and HTTP on (\S+?)\.?$", re.MULTILINE)


class Serving:
    """A `relay` process and what it has said on standard error."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until_up(self) -> str:
        """Where it serves gRPC."""
        wait_for(lambda: SERVES.search(self.said) or self.process.poll() is not None, "the server to come up")
        match = SERVES.search(self.said)
        assert match, self.said
        return match[1]

    def postgres(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if is_postgres(child)]


@contextmanager
def relay(*arguments: str, folder: Path, **environ: str) -> Iterator[Serving]:
    log = folder.parent / f"{time.monotonic_ns()}.log"
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder.parent),
        "RELAY_DATA_DIR": str(folder),
        "RELAY_LISTEN": "127.0.0.1:0",
        "RELAY_HTTP_LISTEN": "127.0.0.1:0",
        "RELAY_SHUTDOWN_GRACE": "2",
        **environ,
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "relay_grpc", *arguments], stdout=output, stderr=output, text=True, env=env
        )
        try:
            yield Serving(process, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def is_postgres(process: psutil.Process) -> bool:
    try:
        return process.name() == "postgres"
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 characters long, with a space and a quote: longer than a socket's path may be."""
    parent = tmp_path / "it's a folder"
    parent.mkdir()
    return parent / ("x" * (200 - len(str(parent))))


def who_am_i(address: str, folder: Path) -> str:
    lines = (folder / "credentials.env").read_text().splitlines()
    key = next(line.split("=", 1)[1] for line in lines if line.startswith("RELAY_ADMIN_KEY="))
    with connect(address, api_key=key) as client:
        return client.auth.who_am_i().workspace_id


def test_it_serves_survives_kill_9_and_leaves_no_postgres_behind(folder: Path) -> None:
    with relay("serve", folder=folder) as first:
        workspace = who_am_i(first.wait_until_up(), folder)
        credentials = folder / "credentials.env"
        assert credentials.stat().st_mode & 0o777 == 0o600
        assert (folder / "key-material.env").stat().st_mode & 0o777 == 0o600
        old = first.postgres()
        assert old
        first.process.kill()
    with relay("serve", folder=folder) as second:
        assert who_am_i(second.wait_until_up(), folder) == workspace
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in old)
        current = second.postgres()
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(PATIENCE) == 0
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in current)
        assert "Traceback" not in second.said


def test_a_second_server_on_one_folder_is_refused_at_once(folder: Path) -> None:
    with relay("serve", folder=folder) as first:
        first.wait_until_up()
        with relay("serve", folder=folder) as second:
            assert second.process.wait(PATIENCE) == 1
            assert str(folder) in second.said
            assert str(first.process.pid) in second.said
            assert len(second.said.strip().splitlines()) == 1
        assert first.process.poll() is None


def test_the_demo_delivers_once_and_exits_0(folder: Path) -> None:
    for _ in range(2):
        with relay("demo", "--once", folder=folder) as demo:
            assert demo.process.wait(PATIENCE) == 0, demo.said
            assert "First action delivered and verified" in demo.said
    with relay("demo", folder=folder) as demo:
        wait_for(lambda: "Ctrl-C stops everything" in demo.said, "the demo to go on serving")
        assert "grpcurl" in demo.said
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(PATIENCE) == 0, demo.said


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("environ", "code", "sentence"),
    [
        ({"RELAY_LISTEN": "127.0.0.1:{taken}"}, 1, "RELAY_LISTEN: can't listen on 127.0.0.1:{taken}"),
        ({"RELAY_HTTP_LISTEN": "127.0.0.1:{taken}"}, 1, "RELAY_HTTP_LISTEN: can't listen on 127.0.0.1:{taken}"),
        (
            {"DATABASE_URL": "postgresql://relay:s3cret@127.0.0.1:{closed}/relay", "RELAY_ENV": "development"},
            1,
            "the database can't be reached",
        ),
        ({"DATABASE_URL": "mysql://somewhere", "RELAY_ENV": "development"}, 2, "DATABASE_URL: should be a postgresql:"),
        ({"REDIS_URL": "http://somewhere"}, 2, "REDIS_URL: should be a redis://"),
        ({"REDIS_URL": "redis://127.0.0.1:port/0"}, 1, "REDIS_URL can't be read"),
        ({"RELAY_LISTEN": "nowhere"}, 2, "RELAY_LISTEN: should be HOST:PORT"),
        ({"RELAY_ENV": "production"}, 2, "DATABASE_URL: RELAY_ENV=production does not run on the embedded database"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(
    environ: dict[str, str], code: int, sentence: str, folder: Path, taken_port: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        names = {"taken": taken_port, "closed": closed.getsockname()[1]}
    environ = {name: value.format(**names) for name, value in environ.items()}
    with relay("serve", folder=folder, **environ) as server:
        assert server.process.wait(PATIENCE) == code, server.said
        assert sentence.format(**names) in server.said
        assert "Traceback" not in server.said
        assert "s3cret" not in server.said


def test_it_ends_with_a_sentence_when_its_postgres_ends(folder: Path) -> None:
    with relay("serve", folder=folder) as server:
        server.wait_until_up()
        for process in server.postgres():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert server.process.wait(PATIENCE) == 1
        assert "the embedded PostgreSQL has ended" in server.said
        assert "Traceback" not in server.said


def test_an_unreachable_redis_is_no_reason_not_to_start(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with relay("serve", folder=folder, REDIS_URL=f"redis://127.0.0.1:{port}") as server:
        assert who_am_i(server.wait_until_up(), folder)
        assert "Traceback" not in server.said
