"""relay.proofs proves what is so of exports and events, and says in which line it is not."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import rfc8785
from relay.proofs import EMPTY_ROOT, ProofError, canonical, open_checkpoint, verify_event, verify_export

from relay_grpc.audit import export
from relay_grpc.audit.checkpoint import Signer
from tests.audit.exports import KEYS, SIGNER, Log, changed


@pytest.fixture
def log() -> Log:
    made = Log()
    made.add(21)
    return made


def refused(lines: Sequence[bytes], match: str, **arguments: Any) -> None:
    with pytest.raises(ProofError, match=match):
        verify_export(lines, KEYS, **arguments)


# Exports


def test_every_range_of_every_log_is_proven() -> None:
    log = Log()
    for size in range(1, 20):
        log.add()
        for first in range(size + 1):
            for end in (None, *range(first, size)):
                report = verify_export(log.export(first, end), KEYS)
                assert (report.first, report.end) == (first, size if end is None else end)
                assert (report.checkpoint.size, report.checkpoint.signers) == (size, ("test-key",))


def test_a_report_says_what_is_proven_and_what_is_not(log: Log) -> None:
    report = verify_export(log.export(3, 9), KEYS)
    assert "6 events, from number 3 up to 9" in " ".join(report.proven())
    assert f"relay/workspaces/{log.workspace}" in " ".join(report.proven())
    unproven = " ".join(report.unproven())
    assert (
        "before number 3 are not in the export: it says that only those logged from 2026-01-01T00:00:00+00:00"
        in unproven
    )
    assert (
        "from number 9 on are not in the export: it says that only those logged before 2026-02-01T00:00:00" in unproven
    )
    assert "Without a checkpoint kept from earlier" in unproven
    assert list(verify_export(log.export(), KEYS, [log.note(5)]).unproven()) == []
    nothing = SIGNER.note(log.workspace, 0, EMPTY_ROOT)
    assert "Without a checkpoint" in " ".join(verify_export(log.export(), KEYS, [nothing]).unproven())


@pytest.mark.parametrize("at", [0, 7, 20])
def test_a_line_that_is_gone_twice_or_elsewhere_is_noticed(log: Log, at: int) -> None:
    lines = log.export()
    refused(lines[:at] + lines[at + 1 :], r"line \d+")
    refused(lines[: at + 1] + lines[at:], f"line {at + 2}: this is event {at} where event {at + 1} should be|field")
    other = (at + 3) % 21
    swapped = list(lines)
    swapped[at], swapped[other] = swapped[other], swapped[at]
    refused(swapped, r"line \d+")
    renumbered = changed(changed(swapped, at, leaf_index=at), other, leaf_index=other)
    refused(renumbered, "another root")


@pytest.mark.parametrize(
    "fields",
    [
        {"event__action": "ActionsService.Preview"},
        {"event__outcome": "denied"},
        {"event__count": 2},
        {"event__scopes": []},
        {"event__event_time": "2026-01-02T03:04:05.000099Z"},
        {"event__added": "x"},
        {"event__commitments__note": "00" * 32},
        {"values__actor_id": "mallory"},
        {"values__actor_id": ""},
        {"values__note": "words"},
        {"salts__actor_id": "00" * 16},
        {"salts__note": "00" * 16},
        {"values__actor_id": None},
        {"values": {}},
        {"salts": {}},
        {"more": 1},
        {"leaf_index": True},
        {"event": []},
        {"event__workspace_id": str(uuid4())},
        {"event__count": 1.0},
        {"event__count": 2**53},
    ],
)
def test_a_change_of_anything_in_a_line_is_noticed(log: Log, fields: dict[str, Any]) -> None:
    refused(changed(log.export(), 4, **fields), r"line 5: |root")
    refused(changed(log.export(), 0, **fields), r"line [12]: |root|checkpoint is of|event 1 should")


def test_a_value_can_not_borrow_from_its_salt(log: Log) -> None:
    lines = log.export()
    content = json.loads(lines[2])
    salt, value = bytes.fromhex(content["salts"]["actor_id"]), content["values"]["actor_id"]
    longer = changed(lines, 2, salts__actor_id=(salt + value[:2].encode()).hex(), values__actor_id=value[2:])
    refused(longer, "line 3: actor_id should be a text with a salt of 16 bytes")


@pytest.mark.parametrize(
    "line",
    [
        b'{"leaf_index":0,"leaf_index":0,"event":{},"values":{},"salts":{}}\n',
        b"\n",
        b"[]\n",
        b"null\n",
        b"\xff\n",
        b'{"leaf_index":NaN}\n',
        b"[" * 100_000 + b"\n",
        b'{"leaf_index":0,"event":{"workspace_id":"\\ud800","commitments":{}},"values":{},"salts":{}}\n',
        b'{"leaf_index":-1,"event":{"workspace_id":"x","commitments":{}},"values":{},"salts":{}}\n',
        b'{"leaf_index":' + b"9" * 5000 + b"}\n",
    ],
)
def test_what_is_no_line_of_an_export_is_refused(log: Log, line: bytes) -> None:
    refused([line, *log.export()], "line 1: ")


def test_an_export_that_is_cut_or_goes_on_is_refused(log: Log) -> None:
    lines = log.export()
    refused([], "cut: after 0 lines")
    refused(lines[:-1], "cut: after 21 lines")
    refused([*lines[:-1], lines[-1][:-1]], "line 22: it is cut")
    refused([*lines, lines[-1]], "line 23: nothing should follow")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"first": 1}, "should be 1 up to 21"),
        ({"end": 20}, "should be 0 up to 20"),
        ({"end": 22}, "up to 22 of 21"),
        ({"left": ["00" * 32]}, "it takes 0 hashes"),
        ({"right": ["00" * 32]}, "it takes 0 hashes"),
        ({"left": ["00"]}, "64 hex digits"),
        ({"checkpoint": "no note"}, "should be a text"),
        ({"start_time": 3}, "start_time is not of the type"),
        ({"start_time": "never.\n\nProven:\n21 events"}, "start_time is no time"),
        ({"end_time": "2026-02-01T00:00:00+00:00\x1b[2J"}, "end_time is no time"),
        ({"more": 3}, "exactly the fields"),
        ({"values": None}, "values is not of the type"),
    ],
)
def test_a_last_line_that_says_otherwise_is_refused(log: Log, fields: dict[str, Any], match: str) -> None:
    refused(changed(log.export(), -1, **fields), f"line 22, which proves the export: .*{match}|line 22: .*{match}")


def test_an_export_begins_and_ends_where_it_was_asked_to(log: Log) -> None:
    refused(changed(log.export(5), -1, start_time=None), "should begin with event 0, and it begins with 5")
    refused(changed(log.export(0, 9), -1, end_time=None), "should end with event 20")


def test_what_others_wrote_steers_no_terminal_of_who_reads_the_error(log: Log) -> None:
    steering = "\x1b[2J\nProven:\x9b\N{RIGHT-TO-LEFT OVERRIDE}" + "x" * 10_000
    for fields in (
        {"event__workspace_id": steering},
        {"values": {steering: "x"}, "salts": {steering: "00" * 16}},
    ):
        with pytest.raises(ProofError, match="Proven:") as raised:
            verify_export(changed(log.export(), 0, **fields), KEYS)
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 1000


def test_an_export_that_somebody_signed_himself_is_refused(log: Log) -> None:
    mine = Signer({"test-key": bytes(32)})
    note = mine.note(log.workspace, 21, log.tree.hash(0, 21))
    refused(
        changed(log.export(), -1, checkpoint=note), r"none of the verifier keys signed .* by test-key\+[0-9a-f]{8}$"
    )
    refused(log.export(), "a checkpoint kept from earlier: none of the verifier keys signed", older=[note])
    with pytest.raises(ProofError, match="there is no verifier key"):
        verify_export(log.export(), [])


# Checkpoints that were kept


def test_a_log_continues_every_checkpoint_that_was_kept(log: Log) -> None:
    notes = [log.note(size) for size in range(1, 22)]
    assert verify_export(log.export(), KEYS, notes).older == tuple(range(1, 22))
    assert verify_export(log.export(8), KEYS, notes[7:]).older == tuple(range(8, 22))
    assert verify_export(log.export(20), KEYS, [notes[15], notes[19]]).older == (16, 20)


def test_what_an_export_can_not_tell_takes_a_consistency_proof(log: Log) -> None:
    note, lines = log.note(7), log.export(8)
    refused(lines, "get the consistency proof from 7 to 21", older=[note])
    refused(lines, "get the consistency proof from 7 to 21", older=[note], consistency=[log.consistency(6), []])
    proven = verify_export(lines, KEYS, [note], [log.consistency(6), log.consistency(7)])
    assert proven.older == (7,)


def test_a_log_that_was_cut_changed_or_is_another_one_is_noticed(log: Log) -> None:
    kept = log.note(21)
    cut = Log(log.workspace, log.rows[:15])
    refused(cut.export(), "has 15 events here and 21 in a checkpoint that was kept: unless", older=[kept])
    cut.add(10)
    refused(cut.export(), "not what it was with 21 events", older=[kept])
    refused(cut.export(21), "not what it was with 21 events", older=[kept])
    refused(cut.export(22), "get the consistency proof", older=[kept], consistency=[cut.consistency(21)])
    other = Log()
    other.add(30)
    refused(other.export(), "is of another log", older=[kept])


# Retention and erasure


def test_what_was_logged_after_a_drop_was_not_dropped_by_it(log: Log) -> None:
    log.add(action="operator.DropEvents", reason="FIRST_KEPT:21")
    log.add(action="operator.DropEvents", reason="FIRST_KEPT:23")
    log.add(2)
    assert verify_export(log.export(21, dropped=21), KEYS).first_kept == 21
    refused(log.export(23, dropped=22), "logged after it")


def test_an_export_after_a_drop_begins_where_an_event_of_the_log_says(log: Log) -> None:
    log.add(action="operator.DropEvents", reason="FIRST_KEPT:6")
    log.add(2)
    report = verify_export(log.export(6, dropped=21), KEYS, [log.note(8)])
    assert report.first_kept == 6
    assert "dropped the events before number 6" in " ".join(report.unproven())
    refused(log.export(7, dropped=21), "should begin with event 6, and it begins with 7")
    refused(log.export(5, dropped=21), "should begin with event 6, and it begins with 5")
    refused(changed(log.export(6), -1, start_time=None), "should begin with event 0")
    refused(log.export(6, dropped=20), "does not say that the operator dropped")
    refused(changed(log.export(6, dropped=21), -1, dropped__event__reason="FIRST_KEPT:7"), "leads to another root")
    refused(changed(log.export(6, dropped=21), -1, dropped__leaf_index=20), "inclusion proof|another root")


def test_erased_values_are_counted_and_those_that_nobody_erased_are_told(log: Log) -> None:
    for at in (3, 5):
        log.rows[at] |= {"actor_id": None, "peer": None, "salts": bytes(128)}
    report = verify_export(log.export(), KEYS)
    assert (report.erased_values, report.erased_events, report.unexplained) == (4, 2, 2)
    assert "somebody did it in the database" in " ".join(report.unproven())
    log.add(action="operator.EraseValues", count=2, reason="ACTOR", duration=timedelta())
    report = verify_export(log.export(), KEYS)
    assert (report.erased_values, report.unexplained) == (4, 0)
    told = " ".join(report.unproven())
    assert "4 values of 2 events are not in the export: they were erased, or somebody took them out." in told
    assert "has erasures of 2 events" in told


def test_values_that_lack_in_a_part_of_the_log_are_not_said_to_be_erased(log: Log) -> None:
    lines = changed(log.export(0, 9), 4, values={}, salts={})
    told = " ".join(verify_export(lines, KEYS).unproven())
    assert "2 values of 1 events are not in the export: they were erased, or somebody took them out." in told
    assert "An export to the end of the log tells which." in told


# Events


def test_an_event_is_proven_alone_with_what_is_shown_of_it(log: Log) -> None:
    leaf, path, checkpoint = log.leaf(4), log.path(4), open_checkpoint(log.note(21), KEYS)
    salts = export.salts_of(log.rows[4])
    assert verify_event(leaf, 4, path, checkpoint)["action"] == "ActionsService.Execute"
    shown = {"peer": "192.0.2.1"}
    verify_event(leaf, 4, path, checkpoint, shown, {"peer": salts["peer"]})
    for wrong in ({"peer": "192.0.2.2"}, {"actor_id": "192.0.2.1"}):
        with pytest.raises(ProofError):
            verify_event(leaf, 4, path, checkpoint, wrong, dict.fromkeys(wrong, salts["peer"]))
    for index, other in ((5, leaf), (4, log.leaf(5)), (4, leaf + b" "), (4, b"[]"), (4, b"{")):
        with pytest.raises(ProofError):
            verify_event(other, index, path, checkpoint)


def test_leaves_are_canonical_in_the_eyes_of_another_implementation(log: Log) -> None:
    for row in log.rows:
        leaf = export.leaf_of(row)
        assert canonical(leaf) == rfc8785.dumps(leaf)
    letters = {"all": "".join(chr(code) for code in range(0x250)) + "\u2028\u2029\ufeff\N{GRINNING FACE}"}
    assert canonical(letters) == rfc8785.dumps(letters)
