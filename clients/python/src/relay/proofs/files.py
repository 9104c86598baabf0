"""Proving an export that is in files, with the keys and checkpoints that somebody kept."""

import base64
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from relay.proofs.exports import MAX_LINE, Report, verify_export
from relay.proofs.notes import VerifierKey
from relay.proofs.tree import ProofError


def verify_file(export: str, keys: Sequence[str], checkpoints: Sequence[Path], consistency: Sequence[Path]) -> Report:
    """Raises ProofError and OSError.

    export: the file; "-" for standard input. keys: verifier keys, or several of them with spaces or newlines between.
    checkpoints: notes kept from earlier. consistency: answers of GetConsistencyProof, as JSON.
    """
    with sys.stdin.buffer if export == "-" else open(export, "rb") as file:
        return verify_export(
            _lines(file),
            [VerifierKey.parse(key) for several in keys for key in several.split()],
            [path.read_bytes() for path in checkpoints],
            [_path(path.read_bytes()) for path in consistency],
        )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file. What is longer than a line may be comes in pieces, which are refused."""
    while line := file.readline(MAX_LINE + 1):
        yield line


def _path(answer: bytes) -> list[bytes]:
    try:
        return [base64.b64decode(hashed, validate=True) for hashed in json.loads(answer)["hashes"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ProofError("a consistency proof should be the answer of GetConsistencyProof, as JSON") from None
