"""Why an action can't be executed, the most telling reason first. No I/O."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from relay_grpc import errors
from relay_grpc.actions.catalogue import Action, find

Row = Any  # a mapping by column: asyncpg.Record, without asyncpg
SWITCHED_OFF = "actions are switched off on this server (ACTIONS_ENABLED)"


def why_disabled(action: Action, halts: Mapping[str, str], runs: Collection[str]) -> str:
    """Empty: the action may run. halts: reasons by provider, '' for all. runs: the providers that this server runs."""
    if not runs:
        return SWITCHED_OFF
    if action.provider not in runs:
        return f"this server has no provider {action.provider!r}"
    halted = halts.get("", halts.get(action.provider))
    return "" if halted is None else f"the operator halted it: {halted}"


def disabled_action(why: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(why, reason="ACTION_DISABLED")


def disabled_connection(row: Row) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        f"the connection is disabled: {row['disabled_reason']}", reason="CONNECTION_DISABLED"
    )


def obstacle(preview_id: str, digest: str, facts: Row, runs: Collection[str]) -> errors.RelayError | None:
    """Why this Execute is not carried out; None: nothing is in its way.

    facts: of store.explain. digest: as the caller saw it; empty: not compared. runs: as in why_disabled.
    """
    if facts["preview_id"] is None:
        return errors.NotFound("preview", preview_id)
    if facts["execution_id"] and not facts["same_request"]:
        return errors.FailedPrecondition(
            "this idempotency key belongs to a different request; use a new key for a new request",
            reason="IDEMPOTENCY_KEY_REUSED",
        )
    if digest not in ("", facts["digest"]):
        return _drifted(["digest"])
    if facts["used_by"]:
        return errors.FailedPrecondition(
            "this preview was executed already, under another idempotency key; preview again",
            reason="PREVIEW_USED",
            metadata={"execution_id": str(facts["used_by"])},
        )
    if facts["expired"]:
        return errors.FailedPrecondition("this preview has expired; preview again", reason="PREVIEW_EXPIRED")
    if not facts["enabled"]:
        return disabled_connection(facts)
    action = find(facts["action_type"])
    if why := why_disabled(action, {} if facts["halted"] is None else {"": facts["halted"]}, runs):
        return disabled_action(why)
    return _drifted(list(_changed(action, facts)))


def _changed(action: Action, facts: Row) -> Iterator[str]:
    if action.version != facts["action_version"]:
        yield "action_version"
    if not facts["same_connection"]:
        yield "connection_version"
    if not facts["intact"]:
        yield "digest"


def _drifted(fields: Sequence[str]) -> errors.FailedPrecondition | None:
    if not fields:
        return None
    return errors.FailedPrecondition(
        f"what would run is not what was previewed ({', '.join(fields)} differs); preview again",
        reason="PREVIEW_DRIFTED",
        metadata={"fields": " ".join(fields)},
    )
