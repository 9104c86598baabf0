"""The life of an execution, as values: what to run, what came of it, and what follows. No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from relay_grpc.actions.signing import Key


class State(StrEnum):
    """relay.v1.ExecutionState; the same words as the Postgres enum execution_state."""

    PENDING = "pending"
    EXECUTING = "executing"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class Outcome(StrEnum):
    """relay.v1.AttemptOutcome; the same words as the Postgres enum attempt_outcome."""

    SUCCESS = "success"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    EGRESS_REFUSED = "egress_refused"
    INTERRUPTED = "interrupted"
    UNSENDABLE = "unsendable"


# Where each state may lead. Postgres keeps the same (the trigger `guard`): only a resend leaves a state that has ended.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.EXECUTING, State.CANCELLED}),
    State.EXECUTING: frozenset({State.PENDING, State.SUCCESS, State.FAILED, State.CANCELLED, State.UNKNOWN}),
    State.UNKNOWN: frozenset({State.SUCCESS, State.FAILED}),
    State.SUCCESS: frozenset({State.PENDING}),
    State.FAILED: frozenset({State.PENDING}),
    State.CANCELLED: frozenset({State.PENDING}),
}
ENDED = frozenset({State.SUCCESS, State.FAILED, State.CANCELLED})


class Delivery(StrEnum):
    """relay.v1.Delivery; the same words as the Postgres enum delivery."""

    AT_LEAST_ONCE = "at_least_once"
    AT_MOST_ONCE = "at_most_once"


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt to make: everything that its provider needs, and nothing that it must look up.

    parameters: those of the preview, as canonical JSON (RFC 8785).
    configuration: the connection's, without secrets.
    keys: those that sign now, newest first. headers: to be sent as well.
    """

    execution_id: UUID
    action: str
    parameters: str
    configuration: Mapping[str, Any]
    keys: tuple[Key, ...]
    headers: Mapping[str, str] = field(default_factory=dict)
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a provider would send, for relay.v1.DeliveryPlan. url: without its query; summary: one line for people.

    addresses: of the host, all of them allowed; none where its name does not resolve now.
    """

    method: str
    url: str
    host: str
    addresses: tuple[str, ...]
    body_bytes: int
    signatures: tuple[str, ...]
    summary: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended.

    status_code: 0 where there was no answer. response_excerpt: at most 4 KiB of UTF-8.
    sent: whether the receiver may have seen any byte of the request. retry_after: seconds that the receiver asked for.
    """

    outcome: Outcome
    status_code: int = 0
    response_excerpt: str = ""
    error: str = ""
    sent: bool = True
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Transition:
    """What an attempt's result does to its execution. delay: until the next attempt, for PENDING alone."""

    state: State
    delay: timedelta = timedelta()


# The waits before attempts 2 to 8: 27 h 35 m in all, the schedule of Svix (docs.svix.com/retries).
RETRY_SCHEDULE = tuple(timedelta(seconds=s) for s in (5, 300, 1800, 7200, 18000, 36000, 36000))
JITTER = 0.2
GONE = 410  # Standard Webhooks: the receiver wants no more of it
TOO_MANY_REQUESTS = 429


def timeout(configuration: Mapping[str, Any], most: float) -> float:
    """The seconds that one attempt may take: the connection's own, and never more than the server's."""
    own: float = configuration.get("timeout", most)
    return min(own, most)


def delays(configuration: Mapping[str, Any]) -> tuple[timedelta, ...]:
    """The waits before a connection's attempts 2, 3 and so on."""
    seconds = configuration.get("retry_delays")
    return RETRY_SCHEDULE if seconds is None else tuple(timedelta(seconds=wait) for wait in seconds)


def after(
    result: AttemptResult,
    attempt: int,
    *,
    delivery: Delivery,
    delays: Sequence[timedelta],
    floor: timedelta,
    jitter: float,
) -> Transition:
    """Decides what follows attempt number `attempt` (from 1) of a send.

    delays: the waits before attempts 2, 3 and so on; after the last there is none. floor: the least wait after a
    timeout or an answer of 429. jitter: evenly drawn from [-1, 1].
    """
    if result.outcome is Outcome.SUCCESS:
        return Transition(State.SUCCESS)
    if delivery is Delivery.AT_MOST_ONCE and result.sent:
        return Transition(State.UNKNOWN)
    if attempt > len(delays) or result.status_code == GONE:
        return Transition(State.FAILED)
    if result.outcome is Outcome.INTERRUPTED:
        return Transition(State.PENDING)  # the receiver is not to blame
    base = delays[attempt - 1].total_seconds()  # as a number: a receiver may ask for more than a timedelta holds
    wait = timedelta(seconds=min(max(base, result.retry_after or 0), 2 * base))
    if result.outcome is Outcome.TIMEOUT or result.status_code == TOO_MANY_REQUESTS:
        wait = max(wait, floor)
    return Transition(State.PENDING, wait * (1 + JITTER * jitter))
