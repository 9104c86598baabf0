"""What a server does now and then beside its calls and its deliveries."""

import asyncio
import logging

from relay_grpc import errors
from relay_grpc.audit.recorder import Recorder
from relay_grpc.auth.oidc import TokenVerifier
from relay_grpc.auth.verifier import KeyVerifier
from relay_grpc.db import Database
from relay_grpc.transport import Transport

log = logging.getLogger(__name__)
INTERVAL = 2.0  # seconds


async def housekeeping(
    db: Database, tokens: TokenVerifier, keys: KeyVerifier, recorder: Recorder, transport: Transport
) -> None:
    """Until it is cancelled: issuers' keys are read, used keys and refusals noted, health follows the database."""
    while True:
        await asyncio.sleep(INTERVAL)
        try:
            tokens.refresh()
            await transport.tell_health(serving=await db.answers())
            await keys.note_used()
            await recorder.flush()
        except errors.RelayError as error:
            log.warning("housekeeping: %s", error)
        except Exception:
            log.exception("housekeeping stumbled")
