"""Identifiers that rise with time."""

import secrets
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

_EPOCH = datetime.fromtimestamp(0, UTC)


def uuid7() -> UUID:
    """A UUID version 7 (RFC 9562, section 5.7): 48 bits of Unix milliseconds, 12 of their fraction, 62 random bits.

    So ids that a process makes one after the other sort as they were made, which is the order of a transaction's events
    in the audit log (section 6.2, method 3). Made here because PostgreSQL has uuidv7() only from version 18 on.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    fraction = (nanoseconds << 12) // 1_000_000
    return UUID(int=milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0x2 << 62 | secrets.randbits(62))


def first_uuid7(moment: datetime) -> UUID:
    """The least of the ids that are made in a moment's millisecond or later: ranges over ids are ranges over time."""
    return UUID(int=max(0, (moment - _EPOCH) // timedelta(milliseconds=1)) << 80)


def time_of(id_: UUID) -> datetime:
    """When a UUID version 7 was made, to the millisecond."""
    return _EPOCH + timedelta(milliseconds=id_.int >> 80)
