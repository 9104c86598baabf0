"""Who carries out actions: one provider for each kind of connection."""

from collections.abc import Mapping
from typing import Any, Protocol

from relay_grpc.actions.execution import AttemptResult, Job, Plan


class Provider(Protocol):
    """Carries out the actions of one kind of connection.

    name: relay.v1.Connection.provider.
    timeout: the total seconds that one attempt may take.
    configuration: the connection's, without secrets.
    """

    name: str
    timeout: float

    async def check(self, configuration: Mapping[str, Any]) -> None:
        """Must raise errors.InvalidRequest where no delivery to this configuration could ever be made."""

    async def plan(self, action: str, parameters: Mapping[str, Any], configuration: Mapping[str, Any]) -> Plan:
        """Must tell exactly what execute would send now, and raise what check raises. Sends nothing."""
        ...

    async def execute(self, job: Job) -> AttemptResult:
        """Makes one attempt within `timeout`. Must not raise for anything the network or the receiver does."""
        ...
