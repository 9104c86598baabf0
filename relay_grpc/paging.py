"""Pages of a listing (aip.dev/158): sizes are coerced, tokens are opaque and fit only the listing they came from."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from relay_grpc import errors
from relay_grpc.call import Call

DEFAULT_SIZE = 50
MAX_SIZE = 200
_SEAL_BYTES = 8
Cursor = TypeVar("Cursor")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Page(Generic[Cursor]):
    """What to fetch: rows after `cursor` (None: from the start), `fetch` of them, one more than the page holds."""

    size: int
    cursor: Cursor | None
    seal: bytes

    @property
    def fetch(self) -> int:
        return self.size + 1

    def answer(
        self,
        kind: Callable[..., Answer],
        items: str,
        rows: Sequence[Any],
        message: Callable[[Any], Any],
        *,
        cursor: str = "id",
    ) -> Answer:
        """The answer that holds the page and the next page's token.

        kind, items: the answer's class and its field for the messages, of which each is made from a row. cursor: the
        column that the rows are ordered by.
        """
        token = ""
        if len(rows) > self.size:
            token = sealed(self.seal, rows[self.size - 1][cursor])
        return kind(**{items: map(message, rows[: self.size])}, next_page_token=token)


def page_of(request: Any, call: Call, parse: Callable[[str], Cursor]) -> Page[Cursor]:
    """Reads page_size and page_token.

    parse: from a cursor's text; raises ValueError, for the seal tells tokens apart and does not keep anybody from
    making one. A token of another workspace, method or filter is an InvalidRequest.
    """
    question = type(request)()
    question.CopyFrom(request)
    question.ClearField("page_size")
    question.ClearField("page_token")
    seal = seal_of(call, question.SerializeToString(deterministic=True))
    cursor = None
    if request.page_token:
        try:
            cursor = unsealed(seal, request.page_token, parse)
        except ValueError:
            problem = "is not one that this listing gave with these filters"
            raise errors.InvalidRequest([("page_token", problem)]) from None
    return Page(min(request.page_size, MAX_SIZE) or DEFAULT_SIZE, cursor, seal)


def seal_of(call: Call, question: bytes = b"") -> bytes:
    """What tells apart the tokens of different workspaces, methods and questions."""
    text = f"{call.method.name}\n{call.workspace_id}\n".encode() + question
    return hashlib.blake2b(text, digest_size=_SEAL_BYTES).digest()


def sealed(seal: bytes, cursor: object) -> str:
    """The token that holds this cursor's text."""
    return base64.urlsafe_b64encode(seal + str(cursor).encode()).decode()


def unsealed(seal: bytes, token: str, parse: Callable[[str], Cursor]) -> Cursor:
    """The cursor of a token that has this seal. Raises ValueError."""
    content = base64.urlsafe_b64decode(token)
    if content[:_SEAL_BYTES] != seal:
        raise ValueError("this token was given to another question")
    return parse(content[_SEAL_BYTES:].decode("ascii"))
