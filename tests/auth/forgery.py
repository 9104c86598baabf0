"""Keys that look right: what anybody who has read the documentation of their format can make."""

import secrets
import string
import zlib

DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase


def text(length: int) -> str:
    return "".join(secrets.choice(DIGITS) for _ in range(length))


def forged(public_id: str = "", secret: str = "", env: str = "dev") -> str:
    """A key with a right checksum: the CRC-32 of what stands before it, in base 62, 6 digits."""
    body = f"rk_{env}_{public_id or text(12)}_{secret or text(32)}"
    check, number = "", zlib.crc32(body.encode())
    while number:
        number, digit = divmod(number, 62)
        check = DIGITS[digit] + check
    return body + check.rjust(6, "0")


def mistyped(key: str, position: int = -1) -> str:
    """The key with another character in one place."""
    other = "A" if key[position] != "A" else "B"
    return key[: position % len(key)] + other + key[position % len(key) + 1 :]
