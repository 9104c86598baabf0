"""What every execution of a database went through, noted by a trigger of the test's own, and what must hold of it."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple
from uuid import UUID

from relay_grpc.actions.execution import ENDED, TRANSITIONS, State

NOTE = """
    CREATE TABLE history (
      id uuid, workspace_id uuid, revision int, status text, attempts int, before int, resends int, lease uuid,
      cancelling boolean, PRIMARY KEY (workspace_id, id, revision)
    );
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
    $$
    BEGIN
      INSERT INTO public.history VALUES (
        NEW.id, NEW.workspace_id, NEW.revision, NEW.status, NEW.attempt_count, NEW.attempts_before, NEW.resend_count,
        NEW.lease_token, NEW.cancel_requested_at IS NOT NULL);
      RETURN NULL;
    END
    $$;
    CREATE TRIGGER note AFTER INSERT OR UPDATE ON action_executions FOR EACH ROW EXECUTE FUNCTION note();
"""


class Step(NamedTuple):
    """An execution as one change left it. before: attempts of earlier sends. lease: whose it is; None: nobody's."""

    id: UUID
    revision: int
    status: State
    attempts: int
    before: int
    resends: int
    lease: UUID | None
    cancelling: bool

    @classmethod
    def of(cls, row: Any) -> "Step":
        return cls(**dict(row) | {"status": State(row["status"])})


async def of_workspace(postgres: Any, workspace_id: UUID) -> dict[UUID, list[Step]]:
    """All that happened there, by execution, first to last. postgres: a connection past every wall."""
    rows = await postgres.fetch(
        """
        SELECT id, revision, status, attempts, before, resends, lease, cancelling FROM history
         WHERE workspace_id = $1 ORDER BY id, revision
        """,
        workspace_id,
    )
    return {id_: list(steps) for id_, steps in groupby(map(Step.of, rows), key=lambda step: step.id)}


def illegal(steps: Sequence[Step], most: int) -> Iterator[str]:
    """What must not have happened to an execution. most: attempts of one send."""
    first = steps[0]
    if (first.revision, first.resends, first.before, first.cancelling) != (1, 0, 0, False):
        yield f"it began as {first}"
    leases = [first.lease] if first.lease else []
    for old, new in pairwise(steps):
        told = f"from {old} to {new}"
        if new.revision != old.revision + 1:
            yield f"a change was not counted: {told}"
        if old.status in ENDED:
            if (new.status, new.resends, new.before) != (State.PENDING, old.resends + 1, old.attempts):
                yield f"an end was left without a resend: {told}"
        elif (new.resends, new.before) != (old.resends, old.before):
            yield f"it was resent before it ended: {told}"
        if new.status is not old.status and new.status not in TRANSITIONS[old.status]:
            yield f"there is no way {told}"
        began = new.status is State.EXECUTING and old.status is not State.EXECUTING
        if new.attempts != old.attempts + began:
            yield f"an attempt was not counted, or counted twice: {told}"
        if new.lease != old.lease and new.lease is not None:
            if not began or new.lease in leases:
                yield f"a second lease of one attempt: {told}"
            leases.append(new.lease)
    for step in steps:
        if (step.status is State.EXECUTING) != (step.lease is not None):
            yield f"a lease without an attempt, or the reverse: {step}"
        if step.attempts - step.before > most:
            yield f"more than {most} attempts: {step}"


def left(steps: Sequence[Step], state: State) -> int:
    """How often it went from this state to another."""
    return sum(old.status is state is not new.status for old, new in pairwise(steps))


def cancelled(steps: Sequence[Step]) -> int:
    """How often somebody cancelled it: at once, or for when its attempt ends."""
    return sum(
        (old.status is State.PENDING and new.status is State.CANCELLED) or new.cancelling > old.cancelling
        for old, new in pairwise(steps)
    )
