"""Every provider of the catalogue conforms, and the suite finds those that don't."""

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any
from uuid import uuid4

import pytest

from relay_grpc.actions.catalogue import CATALOGUE
from relay_grpc.actions.egress import Egress
from relay_grpc.actions.execution import AttemptResult, Job, Plan
from relay_grpc.actions.providers.webhook import WebhookProvider
from tests.actions.conformance import Conformance, Subject
from tests.faults.hostile import behaviours


class TestIndependent(Conformance):
    subject = Subject(
        make=WebhookProvider,
        action="webhook.send",
        parameters=lambda text: {"payload": {"text": text}},
        configuration=lambda url: {"url": url, "body_signature": True},
        id_header="webhook-id",
        timestamp_header="webhook-timestamp",
    )


def test_no_provider_is_left_out() -> None:
    actions = {action.name: action.provider for action in CATALOGUE}
    tested = {one.subject.action for one in Conformance.__subclasses__() if one.__name__.startswith("Test")}
    assert {actions[name] for name in tested} == set(actions.values())


class Raising(WebhookProvider):
    async def execute(self, job: Job) -> AttemptResult:
        async with self._egress.request("POST", job.configuration["url"], body=b"{}", headers={}) as response:
            raise RuntimeError(response.status)


class Endless(WebhookProvider):
    async def execute(self, job: Job) -> AttemptResult:
        self.timeout = 60.0
        return await super().execute(job)


class Unyielding(WebhookProvider):
    """Once cancelled it first ends what it does."""

    async def execute(self, job: Job) -> AttemptResult:
        attempt = asyncio.ensure_future(super().execute(job))
        try:
            return await asyncio.shield(attempt)
        except asyncio.CancelledError:
            await attempt
            raise


class NeverSent(WebhookProvider):
    async def execute(self, job: Job) -> AttemptResult:
        return dataclasses.replace(await super().execute(job), sent=False)


class AlwaysSent(WebhookProvider):
    async def execute(self, job: Job) -> AttemptResult:
        return dataclasses.replace(await super().execute(job), sent=True)


class Forgetful(WebhookProvider):
    async def execute(self, job: Job) -> AttemptResult:
        return await super().execute(dataclasses.replace(job, execution_id=uuid4()))


class Stopped(WebhookProvider):
    """Its clock is."""

    def __init__(self, egress: Egress, timeout: float, clock: Callable[[], float]) -> None:
        super().__init__(egress, timeout, functools.cache(clock))


class Talkative(WebhookProvider):
    async def execute(self, job: Job) -> AttemptResult:
        return dataclasses.replace(await super().execute(job), error=f"sent with {job.headers}")


class Sticky(WebhookProvider):
    """Keeps the headers of its first job."""

    headers: Mapping[str, str] = {}

    async def execute(self, job: Job) -> AttemptResult:
        self.headers = self.headers or job.headers
        return await super().execute(dataclasses.replace(job, headers=self.headers))


class Eager(WebhookProvider):
    async def plan(self, action: str, parameters: Any, configuration: Any, schemes: Any) -> Plan:
        async with asyncio.timeout(0.1):
            await self._egress.session.post(configuration["url"], data=b"{}")
        raise AssertionError


class Trusting(WebhookProvider):
    async def check(self, configuration: Mapping[str, Any]) -> None:
        pass


NOT_FOUND, DRIPS = (one for one in behaviours(0.02) if one.name in ("404", "drips the body"))


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Raising, lambda suite: suite.test_whatever_a_receiver_does_is_one_bounded_attempt(NOT_FOUND, {})),
        (Endless, lambda suite: suite.test_whatever_a_receiver_does_is_one_bounded_attempt(DRIPS, {})),
        (Unyielding, lambda suite: suite.test_a_cancelled_attempt_ends_at_once_and_leaves_nothing_behind()),
        (NeverSent, lambda suite: suite.test_whatever_a_receiver_does_is_one_bounded_attempt(NOT_FOUND, {})),
        (AlwaysSent, lambda suite: suite.test_where_no_connection_comes_about_nothing_was_sent()),
        (Forgetful, lambda suite: suite.test_attempts_have_one_id_and_each_its_own_time()),
        (Stopped, lambda suite: suite.test_attempts_have_one_id_and_each_its_own_time()),
        (Talkative, lambda suite: suite.test_whatever_a_receiver_does_is_one_bounded_attempt(NOT_FOUND, {})),
        (Sticky, lambda suite: suite.test_jobs_share_nothing()),
        (Eager, lambda suite: suite.test_checks_and_plans_send_nothing()),
        (Trusting, lambda suite: suite.test_what_can_never_be_reached_is_refused_early_and_late("https://10.0.0.1/")),
    ],
)
async def test_a_provider_that_breaks_its_promises_is_found_out(
    broken: type[WebhookProvider], test: Callable[[Conformance], Coroutine[Any, Any, None]]
) -> None:
    class Suite(Conformance):
        subject = dataclasses.replace(TestIndependent.subject, make=broken)

    await test(TestIndependent())
    with pytest.raises((AssertionError, TimeoutError, RuntimeError, pytest.fail.Exception)):
        await test(Suite())
