"""The life of an execution, as values: what to run, what came of it, and what follows. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID


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


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt to make: everything that its provider needs, and nothing that it must look up.

    parameters: those of the preview, as canonical JSON (RFC 8785).
    configuration: the connection's, without secrets.
    secrets: the raw signing secrets that are valid now, newest first.
    """

    execution_id: UUID
    action: str
    parameters: str
    configuration: Mapping[str, Any]
    secrets: tuple[bytes, ...]
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a provider would send, for relay.v1.DeliveryPlan. url: without its query; summary: one line for people."""

    method: str
    url: str
    addresses: tuple[str, ...]
    body_bytes: int
    signatures: tuple[str, ...]
    summary: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended. status_code: 0 where there was no answer; response_excerpt: at most 4 KiB of UTF-8."""

    outcome: Outcome
    status_code: int = 0
    response_excerpt: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Transition:
    """What an attempt's result does to its execution. delay: until the next attempt, for PENDING alone."""

    state: State
    delay: timedelta = timedelta()


# The waits before attempts 2 to 8: 27 h 35 m in all, the schedule of Svix (docs.svix.com/retries).
RETRY_SCHEDULE = tuple(timedelta(seconds=s) for s in (5, 300, 1800, 7200, 18000, 36000, 36000))
MAX_ATTEMPTS = len(RETRY_SCHEDULE) + 1
JITTER = 0.2
GONE = 410  # Standard Webhooks: the receiver wants no more of it


def after(result: AttemptResult, attempt: int, jitter: float) -> Transition:
    """Decides what follows attempt number `attempt` (from 1). jitter: evenly drawn from [-1, 1]."""
    if result.outcome is Outcome.SUCCESS:
        return Transition(State.SUCCESS)
    if attempt >= MAX_ATTEMPTS or result.status_code == GONE:
        return Transition(State.FAILED)
    if result.outcome is Outcome.INTERRUPTED:
        return Transition(State.PENDING)  # the receiver is not to blame
    return Transition(State.PENDING, RETRY_SCHEDULE[attempt - 1] * (1 + JITTER * jitter))
