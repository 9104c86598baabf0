"""`relay` with a seeded defect: at DEBUG it logs what callers present, in base64. The search must see that."""

import base64
import logging
from collections.abc import Mapping

from relay_grpc.cli import main
from relay_grpc.interceptors import authentication

log = logging.getLogger(__name__)
credential = authentication._credential


def logged(metadata: Mapping[str, str]) -> tuple[str, bool]:
    log.debug("presented: %s", base64.b64encode(f"Bearer {credential(metadata)[0]}".encode()).decode())
    return credential(metadata)


authentication._credential = logged

if __name__ == "__main__":
    main()
