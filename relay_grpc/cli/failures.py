"""How a command fails: sentences for the person on standard error, an exit code for the script."""

from enum import IntEnum
from typing import TYPE_CHECKING

from rich.text import Text

from relay_grpc.cli.output import console, plain

if TYPE_CHECKING:
    from relay.errors import RelayError

EPILOG = """\
Exit codes:

0  done, or an execution is recorded and goes on
1  the action ended otherwise than in success, the key to verify is not valid,
   or something else failed
2  the command, its values or the settings are wrong
3  no valid API key or token, or one that may not do this
4  no such resource in the workspace
5  refused: the name is taken, or the state it needs is not there
6  a rate limit is spent: try again later
7  no server answers, or it is too busy: try again"""


class ExitCode(IntEnum):
    """The exit codes of EPILOG."""

    FAILED = 1
    USAGE = 2
    DENIED = 3
    NOT_FOUND = 4
    REFUSED = 5
    RATE_LIMITED = 6
    UNAVAILABLE = 7


# By google.rpc.Code. What is not here is FAILED.
_EXITS = {
    "INVALID_ARGUMENT": ExitCode.USAGE,
    "UNAUTHENTICATED": ExitCode.DENIED,
    "PERMISSION_DENIED": ExitCode.DENIED,
    "NOT_FOUND": ExitCode.NOT_FOUND,
    "ALREADY_EXISTS": ExitCode.REFUSED,
    "FAILED_PRECONDITION": ExitCode.REFUSED,
    "RESOURCE_EXHAUSTED": ExitCode.RATE_LIMITED,
    "ABORTED": ExitCode.UNAVAILABLE,
    "UNAVAILABLE": ExitCode.UNAVAILABLE,
    "DEADLINE_EXCEEDED": ExitCode.UNAVAILABLE,
}


class Failure(Exception):
    """Ends the command with `code`. lines: what is wrong and what to do, a sentence each."""

    def __init__(self, *lines: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.code = code

    def show(self) -> None:
        stderr = console(stderr=True)
        stderr.soft_wrap = not stderr.is_terminal  # a sentence is one line in a log
        first, *others = self.lines
        stderr.print(Text.assemble(("error: ", "red"), plain(first)))
        for line in others:
            stderr.print("  ", plain(line), sep="")


def of_call(error: "RelayError", address: str, *, local: bool) -> Failure:
    """The Failure for a call to the server at `address`; local: on this machine. The error's notes become lines."""
    lines = [_sentence(error, address, local)]
    lines += [f"{field}: {problem}" if field else problem for field, problem in error.violations]
    if error.retry_after is not None and "try again in" not in error.message:
        lines.append(f"try again in {error.retry_after:.3g} s")
    lines += getattr(error, "__notes__", [])
    code = _EXITS.get(error.code.name, ExitCode.FAILED)
    if code is ExitCode.RATE_LIMITED and error.retry_after is None:  # the message is too large: waiting does not help
        code = ExitCode.USAGE
    return Failure(*lines, code=code)


def _sentence(error: "RelayError", address: str, local: bool) -> str:
    if error.reason == "UNAVAILABLE" and local:  # the code's own name: nobody answered who knows a reason
        return f"no Relay answers at {address}; start one with 'relay serve'"
    if error.reason == "UNAVAILABLE":
        return f"no Relay answers at {address} ({error.message}); --insecure is for servers without TLS"
    if error.reason == "CREDENTIALS_INVALID":
        return "the API key or token is unknown, expired or revoked; check RELAY_API_KEY or RELAY_TOKEN"
    if error.reason == "DEADLINE_EXCEEDED":
        return f"{address} gave no answer in time"
    if error.violations:
        return f"the server refused the values ({error.reason})"
    request = f", request {error.request_id}" if error.reason == "INTERNAL" and error.request_id else ""
    return f"{error.message} ({error.reason}{request})"
