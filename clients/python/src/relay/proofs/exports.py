"""A JSONL export, verified line by line against the checkpoint that it ends with, and against those held elsewhere."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.proofs.leaves import ORIGIN, canonical, check_leaf, parse, verify_event
from relay.proofs.notes import Checkpoint, VerifierKey, open_checkpoint
from relay.proofs.tree import EMPTY_ROOT, Fold, ProofError, RootOf, leaf_hash, subtrees, verify_consistency

MAX_LINE = 1 << 21  # bytes: the longest note and as much again. Reading JSON takes some thirty times its length
DROP, ERASE = "operator.DropEvents", "operator.EraseValues"
_EVENT_LINE = {"leaf_index": int, "event": dict, "values": dict, "salts": dict}
_LAST_LINE = {"checkpoint": str, "first": int, "end": int, "left": list, "right": list, "values": str}
_MAYBE = {"start_time": str, "end_time": str, "dropped": dict}  # or null
_HASH = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII)
_FIRST_KEPT = re.compile(r"FIRST_KEPT:(0|[1-9][0-9]{0,17})")


@dataclass(frozen=True, slots=True)
class Report:
    """What an export was proven to be: events `first` up to `end` of the log that the checkpoint is of.

    start_time, end_time: what was asked for (RFC 3339), as whoever exported says: nobody signed that. first_kept: up to
    where an event of the log says that its operator dropped the events; 0: nowhere. older: the sizes of the checkpoints
    held elsewhere, which the log continues. erased_values, erased_events: how many values lack, of how many events.
    erasures: of how many events the operator erased values, going by the events that the export has of that.
    """

    checkpoint: Checkpoint
    first: int
    end: int
    start_time: str | None
    end_time: str | None
    first_kept: int
    older: tuple[int, ...]
    erased_values: int
    erased_events: int
    erasures: int

    @property
    def unexplained(self) -> int:
        """How many events lack values without any trace of who erased them, as far as the export can tell.

        An erasure that went on during the export is among them: another export has its event.
        """
        return max(0, self.erased_events - self.erasures) if self.end == self.checkpoint.size else 0

    def _erasing(self) -> str:
        if self.end < self.checkpoint.size:
            return "An export to the end of the log tells which."
        return f"The export has erasures of {self.erasures} events."

    def lines(self) -> Iterator[str]:
        """All of it, for people."""
        yield from ("Proven:", *self.proven())
        if unproven := list(self.unproven()):
            yield from ("", "Not proven:", *unproven)

    def proven(self) -> Iterator[str]:
        """Sentences."""
        log = self.checkpoint
        count = self.end - self.first
        yield f"{count} events, from number {self.first} up to {self.end}, are as {log.origin} has them."
        yield f"The log had {log.size} events then, as {', '.join(log.signers)} signed."
        if self.older:
            yield f"It continues what it was with {', '.join(map(str, self.older))} events."

    def unproven(self) -> Iterator[str]:
        """Sentences about what is not proven."""
        if self.first_kept:
            yield f"The operator dropped the events before number {self.first_kept}, as an event of the log says."
        if self.first > self.first_kept:
            asked = f"only those logged from {self.start_time} on were asked for"
            yield f"The events before number {self.first} are not in the export: it says that {asked}."
        if self.end < self.checkpoint.size:
            asked = f"only those logged before {self.end_time} were asked for"
            yield f"The events from number {self.end} on are not in the export: it says that {asked}."
        if self.erased_values:
            yield (
                f"{self.erased_values} values of {self.erased_events} events are not in the export: they were erased, "
                f"or somebody took them out. {self._erasing()}"
            )
        if self.unexplained:
            yield (
                f"{self.unexplained} events lack values that no operator is known to have erased. Export again: if it "
                "stays so, somebody did it in the database."
            )
        if not any(self.older):
            yield "Without a checkpoint kept from earlier, the log could be another one than it was."


def verify_export(
    lines: Iterable[bytes],
    keys: Sequence[VerifierKey],
    older: Iterable[bytes | str] = (),
    consistency: Collection[Sequence[bytes]] = (),
) -> Report:
    """Reads an export to its end, in constant memory. Raises ProofError, which says in which line what is wrong.

    older: notes of the same log that were kept from earlier. consistency: proofs from them to the export's checkpoint
    (GetConsistencyProof), for those whose roots the export does not tell: they lie before or after its events.
    """
    held = [_open_kept(note, keys) for note in older]
    reading = _Reading({checkpoint.size for checkpoint in held})
    number, last = 0, None
    for number, line in enumerate(lines, 1):
        try:
            if last is not None:
                raise ProofError("nothing should follow the line with the checkpoint")
            content = _content(line)
            if "checkpoint" in content:
                last = content
            else:
                reading.event(content)
        except ProofError as error:
            raise ProofError(f"line {number}: {error}") from None
    if last is None:
        raise ProofError(f"the export is cut: after {number} lines, the one with the checkpoint is missing")
    try:
        return _verify_last(last, reading, keys, held, consistency)
    except ProofError as error:
        raise ProofError(f"line {number}, which proves the export: {error}") from None


@dataclass(slots=True)
class _Reading:
    """The events so far. wanted: sizes at which the subtrees so far are remembered."""

    wanted: Collection[int]
    fold: Fold | None = None
    origin: str = ""
    remembered: dict[int, list[bytes]] = field(default_factory=dict)
    erased_values: int = 0
    erased_events: int = 0
    erasures: int = 0

    def event(self, content: Mapping[str, Any]) -> None:
        _check_types(content, _EVENT_LINE)
        index, event = content["leaf_index"], content["event"]
        if index < 0:
            raise ProofError("the number of an event is below 0")
        if self.fold is None:
            self.fold, self.origin = Fold(index), f"{ORIGIN}{event.get('workspace_id')}"
        if index != self.fold.end:
            raise ProofError(f"this is event {index} where event {self.fold.end} should be")
        if erased := check_leaf(event, self.origin, content["values"], content["salts"]):
            self.erased_values += len(erased)
            self.erased_events += 1
        if event.get("action") == ERASE and event.get("outcome") == "success" and isinstance(event.get("count"), int):
            self.erasures += event["count"]
        self.fold.add(leaf_hash(canonical(event)))
        if self.fold.end in self.wanted:
            self.remembered[self.fold.end] = list(self.fold.hashes)


def _verify_last(
    content: Mapping[str, Any],
    reading: _Reading,
    keys: Sequence[VerifierKey],
    held: Sequence[Checkpoint],
    consistency: Collection[Sequence[bytes]],
) -> Report:
    _check_types(content, _LAST_LINE | _MAYBE)
    checkpoint = open_checkpoint(content["checkpoint"], keys)
    for name in ("start_time", "end_time"):
        if content[name] is not None and not _TIME.fullmatch(content[name]):
            raise ProofError(f"{name} is no time")
    first, end, size = content["first"], content["end"], checkpoint.size
    if not 0 <= first <= end <= size:
        raise ProofError(f"it says that these are the events from {first} up to {end} of {size}")
    fold = reading.fold or Fold(first)
    if (fold.start, fold.end) != (first, end):
        raise ProofError(f"the events are {fold.start} up to {fold.end}, and should be {first} up to {end}")
    if reading.origin not in ("", checkpoint.origin):
        raise ProofError(f"the events are of {reading.origin}, and the checkpoint is of {checkpoint.origin}")
    left = (0, first, _hashes(content["left"]))
    roots = _roots(left, (first, end, fold.hashes), (end, size, _hashes(content["right"])))
    if roots[size] != checkpoint.root:
        raise ProofError("the events are not those that the checkpoint was signed for: their tree has another root")
    kept = _first_kept(content["dropped"], checkpoint)
    if first < kept or (content["start_time"] is None and first > kept):
        raise ProofError(f"the export should begin with event {kept}, and it begins with {first}")
    if content["end_time"] is None and end < size:
        raise ProofError(f"the export should end with event {size - 1}, the last of the log, and it ends before {end}")
    for at, hashes in reading.remembered.items():
        roots[at] = _roots(left, (first, at, hashes))[at]
    for one in held:
        _check_continued(one, checkpoint, roots.get(one.size), consistency)
    return Report(
        checkpoint,
        first,
        end,
        content["start_time"],
        content["end_time"],
        kept,
        tuple(sorted({one.size for one in held})),
        reading.erased_values,
        reading.erased_events,
        reading.erasures,
    )


def _open_kept(note: bytes | str, keys: Sequence[VerifierKey]) -> Checkpoint:
    try:
        return open_checkpoint(note, keys)
    except ProofError as error:
        raise ProofError(f"a checkpoint kept from earlier: {error}") from None


def _check_continued(
    older: Checkpoint, newer: Checkpoint, root: bytes | None, consistency: Collection[Sequence[bytes]]
) -> None:
    """Raises ProofError unless the newer log is the older one and more. root: the newer one's at the older size."""
    if older.origin != newer.origin:
        raise ProofError(f"the checkpoint kept from earlier is of another log, {older.origin}")
    if older.size > newer.size:
        raise ProofError(
            f"the log has {newer.size} events here and {older.size} in a checkpoint that was kept: unless that was "
            "made after this export, the end of the log was cut, or a backup was restored"
        )
    if root is None:
        if not any(_is_consistent(older, newer, path) for path in consistency):
            raise ProofError(
                f"that the log continues what it was with {older.size} events is not proven by this export: get the "
                f"consistency proof from {older.size} to {newer.size}, or export from the beginning"
            )
    elif root != older.root:
        raise ProofError(f"the log is not what it was with {older.size} events: one of those events is another now")


def _is_consistent(older: Checkpoint, newer: Checkpoint, path: Sequence[bytes]) -> bool:
    try:
        verify_consistency(older.size, newer.size, older.root, newer.root, path)
    except ProofError:
        return False
    return True


def _first_kept(dropped: Mapping[str, Any] | None, checkpoint: Checkpoint) -> int:
    """Up to where the operator dropped the events of this log, as an event of it says."""
    if dropped is None:
        return 0
    _check_types(dropped, {"leaf_index": int, "event": dict, "path": list})
    event = dropped["event"]
    verify_event(canonical(event), dropped["leaf_index"], _hashes(dropped["path"]), checkpoint)
    kept = _FIRST_KEPT.fullmatch(str(event.get("reason")))
    if event.get("action") != DROP or event.get("outcome") != "success" or not kept:
        raise ProofError("the event in 'dropped' does not say that the operator dropped events")
    if int(kept[1]) > dropped["leaf_index"]:
        raise ProofError("the event in 'dropped' says that events were dropped which were logged after it")
    return int(kept[1])


def _roots(*parts: tuple[int, int, Sequence[bytes]]) -> dict[int, bytes]:
    """The roots of the log at the sizes where these subtrees end. parts: from, up to, hashes of subtrees() there."""
    folded, roots = RootOf(), {0: EMPTY_ROOT}
    for start, end, hashes in parts:
        places = subtrees(start, end)
        if len(places) != len(hashes):
            raise ProofError(f"it takes {len(places)} hashes to tell the events from {start} up to {end}")
        for (height, _), hashed in zip(places, hashes, strict=True):
            folded.add(hashed, height)
            roots[folded.size] = folded.root()
    return roots


def _hashes(texts: Sequence[Any]) -> list[bytes]:
    if not all(isinstance(text, str) and _HASH.fullmatch(text) for text in texts):
        raise ProofError("a hash should have 64 hex digits")
    return [bytes.fromhex(text) for text in texts]


def _content(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE or not line.endswith(b"\n"):
        raise ProofError("it is cut, or too long")
    content = parse(line)
    if not isinstance(content, dict):
        raise ProofError("it is no JSON object")
    return content


def _check_types(content: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Exactly these fields, of exactly these types; those of _MAYBE may be null."""
    if content.keys() != types.keys():
        raise ProofError(f"it should have exactly the fields {', '.join(types)}")
    for name, value in content.items():
        if type(value) is not types[name] and not (value is None and name in _MAYBE):
            raise ProofError(f"{name} is not of the type that it should be")
