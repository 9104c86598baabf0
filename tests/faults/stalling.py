"""`relay` that stops, as by SIGSTOP, whenever it has heard an answer and not recorded it. Whoever wants it to goes on
sends it SIGCONT.
"""

import os
import signal

from relay_grpc import failpoints
from relay_grpc.cli import main


def reach(point: str) -> None:
    if point == "attempt.answered":
        os.kill(os.getpid(), signal.SIGSTOP)


failpoints.reach = reach

if __name__ == "__main__":
    main()
