"""Places where a test may kill this process, as kill -9 would. Outside of tests none is armed.

Each names the moment between two effects that a crash must not tear apart; RELAY_FAILPOINT, which production refuses,
arms one of them.
"""

import os
import signal
from typing import Final

POINTS: Final = (
    "execute.uncommitted",  # asked for, and not written
    "execute.committed",  # and neither answered nor begun
    "attempt.claimed",  # and not connected
    "attempt.connected",  # and nothing sent
    "attempt.sent",  # the whole request, and no answer
    "attempt.answering",  # the answer's headers are read, and not its body
    "attempt.answered",  # all of it, and not recorded
    "attempt.recorded",
    "retry.scheduling",  # the attempt failed, and that is not written
    "rescue.midway",  # some of the attempts whose worker is gone are ended, the others not
    "audit.appending",  # the change is made, its event is not, nothing is committed
    "audit.committed",  # both are committed, and the call is not answered
    "secret.rotating",  # the new one is there, the old ones have no end yet, nothing is committed
    "erasure.midway",  # values of a batch are erased, its event is not written, nothing is committed
    "migration.midway",  # some statements of a revision ran, nothing is committed
)

_armed = ""
_left = 0


def arm(point: str, nth: int) -> None:
    """Kills the process when it comes to the point for the nth time, from 1."""
    global _armed, _left
    _armed, _left = point, nth


def reach(point: str) -> None:
    """Says that the process is at this point."""
    global _left
    if point == _armed:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
