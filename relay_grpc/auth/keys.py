"""The text of an API key. No I/O.

    rk_live_8fGh2kLmQ0aZ_2mKd93nf0sKQp1xY7bT4cWvE6rUiZo8L1a5Gtq
    rk_ENV_ID_SECRETCHECK

ENV is live or dev. ID, 12 base 62 characters, is public: it finds the key's row. SECRET is 32 random base 62
characters, 190 bits. CHECK, 6 base 62 characters, is the CRC-32 of everything before it: a mistyped or cut key is
refused without a look-up. For secret scanners: rk_(live|dev)_[0-9A-Za-z]{12}_[0-9A-Za-z]{38}
"""

import re
import secrets
import string
import zlib
from dataclasses import dataclass

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
PATTERN = re.compile(
    r"(?P<body>rk_(?:live|dev)_(?P<public_id>[0-9A-Za-z]{12})_[0-9A-Za-z]{32})(?P<check>[0-9A-Za-z]{6})"
)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made: its text, to be shown once, and its public id."""

    text: str
    public_id: str

    def __repr__(self) -> str:
        return f"NewKey({self.public_id})"


def generate(*, live: bool) -> NewKey:
    public_id = _random(12)
    body = f"rk_{'live' if live else 'dev'}_{public_id}_{_random(32)}"
    return NewKey(body + _check(body), public_id)


def public_id_of(presented: str) -> str | None:
    """The public id of a well-formed key; None for anything else."""
    match = PATTERN.fullmatch(presented)
    return match["public_id"] if match and _check(match["body"]) == match["check"] else None


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _check(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):  # 62**6 > 2**32
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    return digits
