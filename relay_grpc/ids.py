"""Identifiers that rise with time."""

import secrets
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

_EPOCH = datetime.fromtimestamp(0, UTC)


def uuid7() -> UUID:
    """A UUID version 7 (RFC 9562, section 5.7): 48 bits of Unix milliseconds, then 74 random bits.

    Made here because PostgreSQL has uuidv7() only from version 18 on.
    """
    value = (time.time_ns() // 1_000_000) << 80 | 0x7 << 76 | secrets.randbits(76)
    return UUID(int=value & ~(0x3 << 62) | 0x2 << 62)


def first_uuid7(moment: datetime) -> UUID:
    """The least of the ids that are made in a moment's millisecond or later: ranges over ids are ranges over time."""
    return UUID(int=max(0, (moment - _EPOCH) // timedelta(milliseconds=1)) << 80)
