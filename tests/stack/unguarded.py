"""tests.stack.ssrf with a Relay whose egress policy permits everything: what it finds then is what it is for."""

import asyncio
import sys
from pathlib import Path

from relay_grpc.actions.destinations import EgressPolicy
from tests.stack.ssrf import main

if __name__ == "__main__":
    EgressPolicy.permits = lambda *_: True  # type: ignore[method-assign]
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
