"""Judges what a run with crashes did: the total-queue checker of Jepsen (jepsen.checker/total-queue), for deliveries.

What was acknowledged must be received; what is received must have been attempted. Jepsen lets duplicates pass; here
each must be the same message once more, with the same id.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Delivery:
    """One request that the receiver got. name: of the action, from the body."""

    name: str
    id: str
    body: bytes


@dataclass(frozen=True)
class Verdict:
    """Names of actions. lost: acknowledged, not received. unexpected: received, never attempted. duplicated: received
    more than once. altered: received with several ids or bodies, with an id that was not the acknowledged one, or with
    the id of another action.
    """

    lost: frozenset[str]
    unexpected: frozenset[str]
    duplicated: frozenset[str]
    altered: frozenset[str]

    @property
    def valid(self) -> bool:
        return not (self.lost or self.unexpected or self.altered)


def judge(attempted: Collection[str], acknowledged: Mapping[str, str], received: Sequence[Delivery]) -> Verdict:
    """attempted: names of actions. acknowledged: the execution's id by name. received: in any order."""
    counts = Counter(delivery.name for delivery in received)
    forms = {(delivery.name, delivery.id, delivery.body) for delivery in received}
    names = Counter(name for name, _, _ in forms)
    ids = Counter(id_ for _, id_, _ in forms)
    return Verdict(
        lost=frozenset(acknowledged.keys() - counts.keys()),
        unexpected=frozenset(counts.keys() - set(attempted)),
        duplicated=frozenset(name for name, count in counts.items() if count > 1),
        altered=frozenset(
            name for name, id_, _ in forms if names[name] > 1 or ids[id_] > 1 or acknowledged.get(name, id_) != id_
        ),
    )
