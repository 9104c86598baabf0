"""Who carries out actions: one provider for each kind of connection."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from relay_grpc.actions.execution import AttemptResult, Job, Plan
from relay_grpc.actions.signing import Scheme


class Provider(Protocol):
    """Carries out the actions of one kind of connection. tests/actions/conformance.py holds every provider to this.

    name: relay.v1.Connection.provider.
    timeout: the total seconds that one attempt may take; a connection's own timeout may be less.
    configuration: the connection's, without secrets.
    """

    name: str
    timeout: float

    async def check(self, configuration: Mapping[str, Any]) -> None:
        """Must raise errors.InvalidRequest where no delivery to this configuration could ever be made."""

    async def plan(
        self, action: str, parameters: Mapping[str, Any], configuration: Mapping[str, Any], schemes: Collection[Scheme]
    ) -> Plan:
        """Must tell exactly what execute would send now, and raise what check raises. Sends nothing.

        schemes: of the keys that would sign, newest first.
        """
        ...

    async def execute(self, job: Job) -> AttemptResult:
        """Makes one attempt within the timeout.

        Must not raise for anything the network or the receiver does; must tell truly whether anything may have been
        sent; must give each attempt of an execution the same id; must end at once when it is cancelled; must keep
        secrets out of what it answers, and nothing from one job to the next.
        """
        ...
