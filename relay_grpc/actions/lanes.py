"""How many attempts one instance makes at a time: in all, for each workspace, for each connection. No I/O."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

MAX_RUNNING = 256


@dataclass(frozen=True, slots=True)
class Room:
    """What may be leased now.

    in_all: attempts. per_workspace, per_connection: the most of one. workspaces, connections: what they run already,
    for those that run anything.
    """

    in_all: int
    per_workspace: int
    per_connection: int
    workspaces: Mapping[UUID, int]
    connections: Mapping[UUID, int]

    def as_arrays(self) -> tuple[list[UUID], list[int], list[UUID], list[int]]:
        """The workspaces with what they run, then the connections: four columns for a statement."""
        return (
            list(self.workspaces.keys()),
            list(self.workspaces.values()),
            list(self.connections.keys()),
            list(self.connections.values()),
        )


class Lanes:
    """Counts the attempts of one process.

    per_connection: the most for one. Of all that can run, one workspace has at most half.
    """

    def __init__(self, per_connection: int, in_all: int | None = None) -> None:
        self._in_all = MAX_RUNNING if in_all is None else in_all
        self._per_workspace = max(self._in_all // 2, 1)
        self._per_connection = per_connection
        self._workspaces: Counter[UUID] = Counter()
        self._connections: Counter[UUID] = Counter()

    @property
    def room(self) -> Room:
        running = self._connections.total()
        return Room(
            self._in_all - running, self._per_workspace, self._per_connection, self._workspaces, self._connections
        )

    def is_full(self, workspace_id: UUID, connection_id: UUID) -> bool:
        """Whether an attempt of this connection has to wait for the end of another."""
        return (
            self._connections[connection_id] >= self._per_connection
            or self._workspaces[workspace_id] >= self._per_workspace
            or self._connections.total() >= self._in_all
        )

    def try_enter(self, workspace_id: UUID, connection_id: UUID) -> bool:
        """An attempt begins, if there is room; whether it does."""
        if self.is_full(workspace_id, connection_id):
            return False
        self.enter(workspace_id, connection_id)
        return True

    def enter(self, workspace_id: UUID, connection_id: UUID) -> None:
        """An attempt begins."""
        self._workspaces[workspace_id] += 1
        self._connections[connection_id] += 1

    def leave(self, workspace_id: UUID, connection_id: UUID) -> None:
        """An attempt has ended."""
        for running, id_ in ((self._workspaces, workspace_id), (self._connections, connection_id)):
            running[id_] -= 1
            if running[id_] == 0:
                del running[id_]  # or this would grow by every workspace that ever ran anything
