"""`make bench`: calls per second and CPU per call, in one run on one machine.

What is compared: a bare grpc.aio echo; WhoAmI through every layer; Execute with a receiver on loopback; and, in this
process, what deciding on a limit costs, and what giving events their places in the audit log does. Rounds are
interleaved and medians are printed, since machines are noisy: trust the ratios and the CPU per call, not the rates.
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from relay import aio
from relay.v1 import auth_pb2
from rich.console import Console
from rich.table import Table

from tests.bench import decisions, sequencing

CONCURRENCY = 32
ROUNDS = 5
CALLS = {"echo": 3000, "WhoAmI": 2500, "Execute": 600}


@dataclass(frozen=True, slots=True)
class Sample:
    """One round. rate: calls per second. cpu, postgres: microseconds a call of the server and of its database."""

    rate: float
    cpu: float
    postgres: float


@contextmanager
def process(module: str, *arguments: str) -> Iterator[tuple[psutil.Process, list[str]]]:
    """Runs a module of this folder until the block ends. Yields it and the words it prints when it is ready."""
    child = subprocess.Popen(
        [sys.executable, "-m", f"tests.bench.{module}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        yield psutil.Process(child.pid), child.stdout.readline().split()
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(30)


async def round_of(call: Callable[[int], Awaitable[object]], calls: int, server: psutil.Process) -> Sample:
    numbers = iter(range(calls))

    async def worker() -> None:
        for number in numbers:
            await call(number)

    cpu, postgres, started = cpu_of(server), cpu_of_postgres(server), time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    elapsed = time.perf_counter() - started
    return Sample(
        calls / elapsed,
        (cpu_of(server) - cpu) / calls * 1e6,
        (cpu_of_postgres(server) - postgres) / calls * 1e6,
    )


def cpu_of(server: psutil.Process) -> float:
    times = server.cpu_times()
    return times.user + times.system


def cpu_of_postgres(server: psutil.Process) -> float:
    return sum(cpu_of(child) for child in server.children(recursive=True) if child.name() == "postgres")


@asynccontextmanager
async def echo(server: psutil.Process, address: str) -> AsyncIterator[Callable[[], Awaitable[Sample]]]:
    body = auth_pb2.Principal(id="0" * 36, name="bench", workspace_id="0" * 36, role="admin").SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        rpc = channel.unary_unary("/bench.Echo/Echo")

        async def call(_number: int) -> None:
            await rpc(body)

        yield lambda: round_of(call, CALLS["echo"], server)


@asynccontextmanager
async def who_am_i(server: psutil.Process, address: str, key: str) -> AsyncIterator[Callable[[], Awaitable[Sample]]]:
    async with aio.connect(address, api_key=key) as relay:

        async def call(_number: int) -> None:
            await relay.auth.who_am_i()

        yield lambda: round_of(call, CALLS["WhoAmI"], server)


@asynccontextmanager
async def execute(
    server: psutil.Process, address: str, key: str, receiver: str
) -> AsyncIterator[Callable[[], Awaitable[Sample]]]:
    async with aio.connect(address, api_key=key) as relay:
        await relay.connections.create_webhook("bench", receiver, default=True)

        async def one_round() -> Sample:
            previews = [
                await relay.actions.preview("webhook.send", {"payload": {"number": number}})
                for number in range(CALLS["Execute"])
            ]

            async def call(number: int) -> None:
                execution = await relay.actions.execute(previews[number])
                assert execution.last_attempt.status_code == 200, execution

            return await round_of(call, CALLS["Execute"], server)

        yield one_round


async def measure(echo_at: str, relay_at: str, key: str, receiver: str, servers: list[psutil.Process]) -> None:
    samples: dict[str, list[Sample]] = {name: [] for name in CALLS}
    async with (
        echo(servers[0], echo_at) as bare,
        who_am_i(servers[1], relay_at, key) as chain,
        execute(servers[1], relay_at, key, receiver) as action,
    ):
        for _ in range(ROUNDS):
            for name, one_round in zip(CALLS, (bare, chain, action), strict=True):
                samples[name].append(await one_round())
    table = Table(title=f"concurrency {CONCURRENCY}, {ROUNDS} interleaved rounds, medians [lowest to highest]")
    for column in ("", "calls/s", "ratio", "CPU/call, us", "ratio", "Postgres, us"):
        table.add_column(column, justify="right")
    rates = {name: statistics.median(one.rate for one in taken) for name, taken in samples.items()}
    cpus = {name: statistics.median(one.cpu for one in taken) for name, taken in samples.items()}
    for name, taken in samples.items():
        spread = sorted(one.rate for one in taken)
        table.add_row(
            name,
            f"{rates[name]:,.0f} [{spread[0]:,.0f} to {spread[-1]:,.0f}]",
            f"{rates[name] / rates['echo']:.2f}",
            f"{cpus[name]:,.0f}",
            f"{cpus[name] / cpus['echo']:.2f}",
            f"{statistics.median(one.postgres for one in taken):,.0f}",
        )
    Console(width=100).print(table)


def main() -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        bare, (echo_at,) = stack.enter_context(process("echo"))
        _, (receiver,) = stack.enter_context(process("receiver"))
        relay, (relay_at, key) = stack.enter_context(process("relay", str(Path(folder, "data"))))
        asyncio.run(measure(echo_at, relay_at, key, receiver, [bare, relay]))
    Console(width=100).print(asyncio.run(decisions.measure()))
    Console(width=100).print(sequencing.measure())


main()
