"""Judges what a run with faults did: the total-queue checker of Jepsen (jepsen.checker/total-queue), for deliveries.

What was acknowledged must be received; what is received must have been attempted. Jepsen lets duplicates pass; here
each must be the same message once more, with the same id, and be accounted for: a request whose answer is not on record
needs an attempt on record of which Relay says that it does not know how it ended.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Delivery:
    """One request that the receiver got. name: of the action, from the body. at: when, in seconds since the epoch.

    answer: what the receiver said to it, and to no other. taken: whether that was a 2xx.
    """

    name: str
    id: str
    body: bytes
    at: float
    answer: str
    taken: bool = True


@dataclass(frozen=True)
class Attempt:
    """One attempt as Relay has it on record. name, id: the execution's. number: from 1. began, ended: as Delivery.at.

    answer: the receiver's; empty: Relay heard none. succeeded: whether that ended the execution.
    """

    name: str
    id: str
    number: int
    began: float
    ended: float
    answer: str
    succeeded: bool = True


@dataclass(frozen=True)
class Verdict:
    """Names of actions.

    lost: acknowledged, and never received and taken. unexpected: received, and never attempted, or under an id that
    Relay has no execution of. altered: received with several ids or bodies, with an id that was not the acknowledged
    one, or with the id of another action. duplicated: received again after it had been taken. unexplained: received
    more often than attempts whose end is unknown allow. misrecorded: has attempts on record that can't be: not counted
    from 1 on, of which one began before the one before it ended, or after which nothing was to be sent; or that tell
    of an answer which this action did not get, or got before the attempt began.
    """

    lost: frozenset[str]
    unexpected: frozenset[str]
    altered: frozenset[str]
    duplicated: frozenset[str]
    unexplained: frozenset[str]
    misrecorded: frozenset[str]

    @property
    def valid(self) -> bool:
        return not (self.lost or self.unexpected or self.altered or self.unexplained or self.misrecorded)


def judge(
    attempted: Collection[str],
    acknowledged: Mapping[str, str],
    received: Sequence[Delivery],
    recorded: Sequence[Attempt],
) -> Verdict:
    """attempted: names of actions. acknowledged: the execution's id by name. received: in the order of arrival."""
    of = defaultdict[str, list[Delivery]](list)
    for delivery in received:
        of[delivery.name].append(delivery)
    records = defaultdict[str, list[Attempt]](list)
    for attempt in sorted(recorded, key=lambda one: one.number):
        records[attempt.name].append(attempt)
    known = {attempt.id for attempt in recorded}
    forms = {(delivery.name, delivery.id, delivery.body) for delivery in received}
    names = Counter(name for name, _, _ in forms)
    ids = Counter(id_ for _, id_, _ in forms)
    return Verdict(
        lost=frozenset(acknowledged.keys() - {delivery.name for delivery in received if delivery.taken}),
        unexpected=frozenset(one.name for one in received if one.name not in attempted or one.id not in known),
        altered=frozenset(
            name for name, id_, _ in forms if names[name] > 1 or ids[id_] > 1 or acknowledged.get(name, id_) != id_
        ),
        duplicated=frozenset(name for name, them in of.items() if any(one.taken for one in them[:-1])),
        unexplained=frozenset(name for name, them in of.items() if not _explained(them, records[name])),
        misrecorded=frozenset(name for name, them in records.items() if not _possible(them, of[name])),
    )


def _explained(deliveries: Sequence[Delivery], attempts: Sequence[Attempt]) -> bool:
    told = {attempt.answer for attempt in attempts}
    untold = sum(delivery.answer not in told for delivery in deliveries)
    return untold <= sum(not attempt.answer for attempt in attempts)


def _possible(attempts: Sequence[Attempt], deliveries: Sequence[Delivery]) -> bool:
    given = {delivery.answer: delivery.at for delivery in deliveries}
    told = [attempt for attempt in attempts if attempt.answer]
    return (
        [attempt.number for attempt in attempts] == list(range(1, len(attempts) + 1))
        and all(one.ended <= after.began for one, after in pairwise(attempts))
        and not any(attempt.succeeded for attempt in attempts[:-1])
        and len({attempt.answer for attempt in told}) == len(told)
        and all(attempt.answer in given and attempt.began <= given[attempt.answer] for attempt in told)
    )
