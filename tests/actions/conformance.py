"""What every provider is held to, whatever it delivers to. test_providers.py has a subclass for each."""

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID, uuid4

import pytest
import rfc8785
from aiohttp import web

from relay_grpc import errors
from relay_grpc.actions import signing
from relay_grpc.actions.destinations import EgressPolicy
from relay_grpc.actions.egress import Egress
from relay_grpc.actions.execution import AttemptResult, Job, Outcome
from relay_grpc.actions.providers import Provider
from relay_grpc.actions.signing import Key, Scheme
from tests.actions.caller import eventually
from tests.faults.hostile import TRUSTED, Behaviour, behaviours, hangs, make_certificates, serving

TIMEOUT, GRACE = 0.4, 0.5
SCHEMES = (Scheme.HMAC, Scheme.ED25519)
DEVELOPMENT = EgressPolicy(allow_loopback=True, https_only=False)
PRODUCTION = EgressPolicy(allow_loopback=False, https_only=True)
REFUSED = ("https://10.0.0.1/", "https://[::1]/", "https://169.254.169.254/latest/", "https://localhost/")
NO_URL = ("https://127.1/", "http://receiver.example/", "https://user@receiver.example/")


@dataclass(frozen=True)
class Subject:
    """A provider, and how to drive it.

    make: from its way out, the seconds of an attempt, and a clock in Unix seconds. action: one of its actions.
    parameters: for it, with one text in them. configuration: of a connection that leads to a URL. id_header,
    timestamp_header: where a request says which execution it is of, and when it was made.
    """

    make: Callable[[Egress, float, Callable[[], float]], Provider]
    action: str
    parameters: Callable[[str], dict[str, Any]]
    configuration: Callable[[str], dict[str, Any]]
    id_header: str
    timestamp_header: str


@dataclass
class Receiver:
    """It keeps what it gets, as headers and body. open: connections that it has."""

    url: str = ""
    requests: list[tuple[Mapping[str, str], bytes]] = field(default_factory=list)

    async def take(self, request: web.BaseRequest) -> web.Response:
        self.requests.append((dict(request.headers), await request.read()))
        return web.Response(text=json.dumps(dict(request.headers)))


@asynccontextmanager
async def receiving() -> AsyncIterator[tuple[Receiver, web.Server]]:
    receiver = Receiver()
    server = web.Server(receiver.take)
    runner = web.ServerRunner(server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    try:
        yield receiver, server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _deaf() -> AsyncIterator[str]:
    """A port whose queue of connections is full: the kernel answers no more of them."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        for one in waiting:
            one.close()


def _closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"


class Conformance:
    """subject: what is held to it."""

    subject: ClassVar[Subject]

    @asynccontextmanager
    async def provider(
        self,
        policy: EgressPolicy = DEVELOPMENT,
        getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo,
        clock: Callable[[], float] = time.time,
    ) -> AsyncIterator[Provider]:
        egress = Egress(policy, getaddrinfo)
        try:
            yield self.subject.make(egress, TIMEOUT, clock)
        finally:
            await egress.close()

    def job(self, url: str, execution_id: UUID | None = None) -> Job:
        """A job of a tenant of its own: its keys, its headers and its text are nobody else's."""
        return Job(
            execution_id=execution_id or uuid4(),
            action=self.subject.action,
            parameters=rfc8785.dumps(self.subject.parameters(f"text-{uuid4()}")).decode(),
            configuration=self.subject.configuration(url),
            keys=(
                Key(Scheme.HMAC, signing.decode_secret(signing.new_secret())),
                Key(Scheme.ED25519, signing.new_ed25519()),
            ),
            headers={"Authorization": f"Bearer header-{uuid4()}"},
        )

    async def executes(self, provider: Provider, job: Job) -> AttemptResult:
        """One attempt: it ends in time, within its bounds, and tells no secret."""
        async with asyncio.timeout(TIMEOUT + GRACE):
            result = await provider.execute(job)
        assert len(result.response_excerpt.encode()) <= 4096
        assert result.retry_after is None or result.retry_after >= 0
        assert (result.error == "") is (result.outcome is Outcome.SUCCESS)
        for secret in (*job.headers.values(), *(key.raw.hex() for key in job.keys), *map(_base64, job.keys)):
            assert secret.removeprefix("Bearer ") not in repr(result)
        return result

    @pytest.mark.parametrize("url", [*REFUSED, *NO_URL])
    async def test_what_can_never_be_reached_is_refused_early_and_late(self, url: str) -> None:
        configuration = self.subject.configuration(url)
        async with self.provider(PRODUCTION) as provider:
            plan = partial(provider.plan, self.subject.action, self.subject.parameters("text"))
            for look in (partial(provider.check, configuration), partial(plan, configuration, SCHEMES)):
                with pytest.raises(errors.InvalidRequest) as refusal:
                    await look()
                assert (refusal.value.reason == "EGRESS_REFUSED") is (url in REFUSED)
            result = await self.executes(provider, self.job(url))
        assert (result.outcome, result.status_code, result.sent) == (Outcome.EGRESS_REFUSED, 0, False)

    async def test_checks_and_plans_send_nothing(self) -> None:
        async with self.provider() as provider, serving(hangs) as receiver:
            configuration = self.subject.configuration(receiver.url)
            await provider.check(configuration)
            plan = await provider.plan(self.subject.action, self.subject.parameters("t"), configuration, SCHEMES)
            assert plan.addresses == ("127.0.0.1",)
            assert (await self.executes(provider, self.job(receiver.url))).sent  # so whoever had come had been seen
        assert (receiver.connections, receiver.requests) == (1, 1)

    @pytest.mark.parametrize("behaviour", behaviours(0.02), ids=lambda behaviour: behaviour.name)
    async def test_whatever_a_receiver_does_is_one_bounded_attempt(
        self, behaviour: Behaviour, certificates: Mapping[str, ssl.SSLContext]
    ) -> None:
        async with (
            self.provider() as provider,
            serving(behaviour.script, certificates.get(behaviour.certificate)) as receiver,
        ):
            results = [await self.executes(provider, self.job(receiver.url)) for _ in range(2)]
            assert [(one.outcome, one.status_code) for one in results] == [(behaviour.outcome, behaviour.status)] * 2
            assert {one.sent for one in results} == {receiver.bytes > 0}
            assert receiver.requests == (2 if receiver.bytes else 0)

    async def test_where_no_connection_comes_about_nothing_was_sent(self) -> None:
        thaw = threading.Event()

        def hanging(*_: Any, **__: Any) -> list[Any]:
            thaw.wait(10)
            return []

        def unknown(*_: Any, **__: Any) -> list[Any]:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")

        def nowhere(*_: Any, **__: Any) -> list[Any]:
            return []

        def elsewhere(_: str, port: int, *__: Any, **___: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", port))]

        name = "http://receiver.example/"
        async with _deaf() as deaf, serving(hangs) as plain:
            for getaddrinfo, url, outcomes in (
                (hanging, name, {Outcome.TIMEOUT}),
                (unknown, name, {Outcome.UNREACHABLE}),
                (nowhere, name, {Outcome.UNREACHABLE}),
                (elsewhere, name, {Outcome.EGRESS_REFUSED}),
                (socket.getaddrinfo, _closed_port(), {Outcome.UNREACHABLE}),
                (socket.getaddrinfo, deaf, {Outcome.TIMEOUT}),
                (socket.getaddrinfo, plain.url.replace("http:", "https:"), {Outcome.UNREACHABLE, Outcome.TIMEOUT}),
            ):
                async with self.provider(getaddrinfo=getaddrinfo) as provider:
                    result = await self.executes(provider, self.job(url))
                    assert result.outcome in outcomes, url
                    assert not result.sent, url
                    assert result.status_code == 0
        thaw.set()

    async def test_attempts_have_one_id_and_each_its_own_time(self) -> None:
        now, execution_id = 1_700_000_000.0, uuid4()
        async with self.provider(clock=lambda: now) as provider, receiving() as (receiver, _):
            for _ in range(3):
                assert (await self.executes(provider, self.job(receiver.url, execution_id))).outcome is Outcome.SUCCESS
                now += 7
        told = [{name.lower(): value for name, value in headers.items()} for headers, _ in receiver.requests]
        assert [headers[self.subject.id_header] for headers in told] == [str(execution_id)] * 3
        assert [int(headers[self.subject.timestamp_header]) - 1_700_000_000 for headers in told] == [0, 7, 14]

    async def test_a_cancelled_attempt_ends_at_once_and_leaves_nothing_behind(self) -> None:
        async with self.provider() as provider, receiving() as (receiver, server), serving(hangs) as hanging:
            for turn in range(40):
                job = self.job(hanging.url if turn % 2 else receiver.url)
                attempt = asyncio.create_task(provider.execute(job))
                for _ in range(turn):
                    await asyncio.sleep(0)
                ended = attempt.done()
                attempt.cancel()
                started = time.monotonic()
                await asyncio.wait([attempt])
                assert time.monotonic() - started < TIMEOUT / 2
                assert attempt.cancelled() is not ended
            assert (await self.executes(provider, self.job(receiver.url))).outcome is Outcome.SUCCESS
            await eventually(lambda: hanging.open == 0)
            await eventually(lambda: len(server.connections) <= 1)  # the one that is kept

    async def test_jobs_share_nothing(self) -> None:
        async with self.provider() as provider, receiving() as (receiver, _):
            jobs = [self.job(receiver.url) for _ in range(100)]
            for some in (jobs[:10], jobs[10:]):  # the second many meet connections that the first have used
                await asyncio.gather(*(self.executes(provider, job) for job in some))
        assert len(receiver.requests) == len(jobs)
        for headers, body in receiver.requests:
            whole = json.dumps({name.lower(): value for name, value in headers.items()}) + body.decode()
            [own] = [job for job in jobs if str(job.execution_id) in whole]
            for job in jobs:
                told = (job.headers["Authorization"] in whole, self._text(job) in whole)
                assert told == (job is own, job is own)

    def _text(self, job: Job) -> str:
        start = job.parameters.index("text-")
        return job.parameters[start : start + 41]

    @pytest.fixture
    def certificates(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, ssl.SSLContext]:
        """Those of the receivers; their authority is trusted."""
        made = make_certificates(tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / TRUSTED))
        return made


def _base64(key: Key) -> str:
    return signing.encode_secret(key.raw).removeprefix(signing.SECRET_PREFIX)
