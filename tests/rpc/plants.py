"""Secrets that a test plants, and the search for them in whatever a server told."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from secrets import token_hex
from urllib.parse import quote

from relay_grpc.auth import keys


@dataclass
class Plants:
    """What was planted, by where. Each secret has a part that is like nothing else, which is what is looked for.

    kept: those that a table may hold, because they are what callers gave to be used or shown. shown: those of them that
    the audit log tells, to whoever may read it, in these places.
    """

    where: dict[str, str] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    shown: dict[str, frozenset[str]] = field(default_factory=dict)

    def new(self, where: str, *, kept: bool = False, shown: Iterable[str] = ()) -> str:
        """A new secret: letters and digits, so that it stays whole in a URL, in JSON and in metadata."""
        secret = self.known(f"canary{token_hex(8)}", where)
        if kept:
            self.kept.add(secret)
        self.shown[secret] = frozenset(shown)
        return secret

    def known(self, secret: str, where: str) -> str:
        """Looks for a secret that somebody else made."""
        self.where[secret] = where
        return secret

    def key(self, text: str, where: str) -> str:
        """Looks for the secret part of an API key; the rest of it may be told."""
        self.known(text.rpartition("_")[2][:32], where)
        return text

    def unknown_key(self, where: str) -> str:
        """A well-formed key that nobody made."""
        return self.key(keys.generate(live=False).text, where)

    def found(self, places: Mapping[str, str], tables: str = "") -> list[str]:
        """Where which secrets are, in whatever form. places: texts by name. tables: all rows."""
        found = []
        for secret, where in self.where.items():
            for form, looks in forms(secret):
                shown = self.shown.get(secret, frozenset())
                found += [
                    f"{place}: {secret} ({where}) as {form}"
                    for place, text in places.items()
                    if looks in text and place not in shown
                ]
                if looks in tables and secret not in self.kept:
                    found.append(f"tables: {secret} ({where}) as {form}")
        return found


def forms(secret: str) -> Iterator[tuple[str, str]]:
    """How a text may have been written down."""
    raw = secret.encode()
    yield "text", secret
    yield "hex", raw.hex()
    yield "upper-case hex", raw.hex().upper()
    yield "URL-encoded", "".join(f"%{byte:02X}" for byte in raw)
    yield "JSON-escaped", "".join(f"\\u{ord(character):04x}" for character in secret)
    for offset in range(3):  # where it begins; the characters that it shares with its neighbours are cut off
        rest = -(offset + len(raw)) % 3
        encoded = base64.b64encode(bytes(offset) + raw + bytes(rest)).decode()
        cut = encoded[(0, 2, 3)[offset] : len(encoded) - (0, 2, 3)[rest]]
        yield "base64", cut
        yield "URL-safe base64", cut.replace("+", "-").replace("/", "_")


def embedded(secret: str) -> Iterator[tuple[str, str]]:
    """Every form inside a longer text, as encoders really write it: to try the search with."""
    for before in ("", "a", "ab", "abc"):
        whole = f"{before}{secret}{before}xyz"
        yield "text", whole
        yield "hex", whole.encode().hex()
        yield "upper-case hex", whole.encode().hex().upper()
        yield "URL-encoded", quote(whole, safe="")
        yield "URL-encoded", "".join(f"%{byte:02X}" for byte in whole.encode())
        yield "JSON-escaped", json.dumps(whole)
        yield "JSON-escaped", "".join(f"\\u{ord(character):04x}" for character in whole)
        yield "base64", base64.b64encode(whole.encode()).decode()
        yield "URL-safe base64", base64.urlsafe_b64encode(whole.encode()).decode()
