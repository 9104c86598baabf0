"""One call as data: what is sent, for how long, when it is repeated, and how a list or a watch goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

from google.protobuf.message import Message

from relay.errors import Contention, RelayError, Unavailable
from relay.v1.audit_pb2 import TailEventsRequest, TailEventsResponse

DEADLINE = 30.0  # seconds
RESUME_AFTER = 1.0  # seconds

Answer = TypeVar("Answer")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One unary call that answers an Answer. method: its name in the service's stub."""

    method: str
    request: Message
    timeout: float = DEADLINE

    def pause(self, error: RelayError, remaining: float) -> float | None:
        """Seconds after which to send the call again, None to give up. remaining: seconds until the deadline.

        Only Execute is repeated here, and only where Relay says when: its idempotency key makes that safe. The
        channel's service config repeats what is UNAVAILABLE.
        """
        if self.method != "Execute" or not isinstance(error, Contention) or error.retry_after is None:
            return None
        return error.retry_after if error.retry_after < remaining else None


@dataclass(frozen=True)
class Page(Call[Any], Generic[Item]):
    """A call that answers one page of a list. field: the one of the answer that holds the items."""

    field: str = ""

    def items(self, answer: Any) -> Sequence[Item]:
        items: Sequence[Item] = getattr(answer, self.field)
        return items

    def next(self, answer: Any) -> Self | None:
        """The call for the page after this answer. None: it was the last one."""
        if not answer.next_page_token:
            return None
        request: Any = type(self.request)()
        request.CopyFrom(self.request)
        request.page_token = answer.next_page_token
        return replace(self, request=request)


@dataclass(frozen=True)
class Stream(Call[Item], Generic[Item]):
    """A call that answers one message after the other. timeout: of the whole."""

    def pause(self, error: RelayError, remaining: float) -> float | None:
        """Seconds after which to ask again, None to give up. It is asked for streams that had begun."""
        return None

    def after(self, newest: Item) -> Self:
        """The call that goes on behind this message."""
        return self


@dataclass(frozen=True)
class Watch(Stream[Item]):
    """A stream that is taken up again where it broke: the first message tells how things are now."""

    def pause(self, error: RelayError, remaining: float) -> float | None:
        return RESUME_AFTER if isinstance(error, Unavailable) and remaining > RESUME_AFTER else None


@dataclass(frozen=True)
class Tail(Watch[TailEventsResponse]):
    """A stream that is taken up again from the last cursor."""

    def after(self, newest: TailEventsResponse) -> Self:
        return replace(self, request=TailEventsRequest(cursor=newest.cursor))
