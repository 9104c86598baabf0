"""When deliveries to a connection pause, and when they end: a circuit breaker, as values. No I/O.

It is closed until attempts fail in a row; then open, and after its pause half open: one attempt is made, a probe.
10 failures open it, as Convoy's; at 50, 70, 90 and 100 % of 100 it is told of, and at 100 disabled, as by Outpost.

While it is open, probes alone count. The others were under way when it opened: a receiver that is away for a moment can
fail hundreds of them at once, and must not be given up for that.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from relay_grpc.actions.execution import GONE, TOO_MANY_REQUESTS, AttemptResult, Outcome

FAILURES_TO_OPEN = 10
WARNINGS = (50, 70, 90, 100)
FAILURES_TO_DISABLE = 100
LONGEST_PAUSE = timedelta(hours=1)
_DOUBLINGS = 16  # of the shortest pause that settings allow, 0.1 s, exceed the longest


@dataclass(frozen=True, slots=True)
class Breaker:
    """What a connection's row keeps of its health.

    failures: attempts that failed since one succeeded. probes: of them, those made while the breaker was open.
    open_until: None: it is closed, with fewer than FAILURES_TO_OPEN failures; past: half open.
    """

    failures: int = 0
    failing_since: datetime | None = None
    probes: int = 0
    open_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """Results of attempts in the order in which they were recorded, as much of them as matters.

    succeeded: any did. failures, probes: since the last that did. gone: the receiver answered 410 Gone to any.
    """

    succeeded: bool = False
    failures: int = 0
    probes: int = 0
    gone: bool = False

    def then(self, later: "Tally") -> "Tally":
        earlier = Tally() if later.succeeded else self
        return Tally(
            self.succeeded or later.succeeded,
            earlier.failures + later.failures,
            earlier.probes + later.probes,
            self.gone or later.gone,
        )


def tally(result: AttemptResult, *, probe: bool) -> Tally | None:
    """What one result says of the receiver; None: nothing, because it is not to blame, or is there and asks for time.

    probe: the breaker was open when the attempt began.
    """
    if result.outcome is Outcome.SUCCESS:
        return Tally(succeeded=True)
    if result.outcome in (Outcome.INTERRUPTED, Outcome.UNSENDABLE) or result.status_code == TOO_MANY_REQUESTS:
        return None
    return Tally(failures=1, probes=int(probe), gone=result.status_code == GONE)


@dataclass(frozen=True, slots=True)
class Decision:
    """events: (action, reason) for the audit log. disabled_reason: for people; empty: the connection stays enabled."""

    breaker: Breaker
    events: tuple[tuple[str, str], ...] = ()
    disabled_reason: str = ""


def after(breaker: Breaker, seen: Tally, *, pause: timedelta, now: datetime) -> Decision:
    """Decides what results do to an enabled connection. pause: the first, doubled after each probe that failed."""
    before = Breaker() if seen.succeeded else breaker
    probes, open_until = before.probes, before.open_until
    if open_until is None:
        failures = min(before.failures + seen.failures, FAILURES_TO_OPEN)
        if failures == FAILURES_TO_OPEN:
            open_until = now + pause
    else:
        failures = before.failures + seen.probes
        if seen.probes:
            probes += seen.probes
            open_until = now + min(pause * 2 ** min(probes, _DOUBLINGS), LONGEST_PAUSE)
    failing_since = (before.failing_since or now) if failures else None

    events = []
    if seen.succeeded and breaker.failures >= WARNINGS[0]:
        events.append(("connection.recovered", ""))
    events += [("connection.degraded", str(step)) for step in WARNINGS if before.failures < step <= failures]
    disabled_reason = ""
    if seen.gone:
        disabled_reason = "the receiver answered 410 Gone"
        events.append(("connection.disabled", "GONE"))
    elif failures >= FAILURES_TO_DISABLE:
        disabled_reason = f"{failures} deliveries in a row failed"
        events.append(("connection.disabled", "FAILING"))
    return Decision(Breaker(failures, failing_since, probes, open_until), tuple(events), disabled_reason)
