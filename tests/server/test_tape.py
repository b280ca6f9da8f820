from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harnessd.server.tape import MAX_LINE_BYTES, TORN_BYTES, UNNUMBERED, Line, Tape

RUN = 7


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "7"
    path.touch()
    return path


def append(path: Path, *pieces: bytes | str) -> None:
    with path.open("ab") as file:
        for piece in pieces:
            file.write(piece.encode() if isinstance(piece, str) else piece)


def ours(seq: int, value: str = '{"n":1}', kind: str = "status") -> str:
    return f'{{"seq":{seq},"t":1700000000.123456,"{kind}":{value}}}\n'


def said(lines: list[Line]) -> list[tuple[int, str, str]]:
    return [(line.seq, line.kind, line.text) for line in lines]


def test_our_own_lines_are_read_with_number_time_and_raw_text(journal: Path) -> None:
    append(journal, ours(1, '{"a": [1, 2.50]}'), ours(2, "5", "ack"), ours(3, '"boom"', "error"))
    lines = Tape(journal, RUN).read()
    assert lines[0] == Line(RUN, 1, 1_700_000_000_123_456, "status", '{"a": [1, 2.50]}')
    assert said(lines[1:]) == [(2, "ack", "5"), (3, "error", '"boom"')]


def test_what_was_read_is_not_read_again_and_the_offset_goes_on(journal: Path) -> None:
    append(journal, ours(1))
    tape = Tape(journal, RUN)
    assert len(tape.read()) == 1
    assert tape.read() == []
    append(journal, ours(2))
    assert tape.backlog_bytes() == len(ours(2))
    assert Tape(journal, RUN, offset=tape.offset, lines=tape.lines).read() == tape.read()
    assert tape.lines == 2
    assert tape.backlog_bytes() == 0


def test_a_small_limit_reads_everything_piece_by_piece(journal: Path) -> None:
    append(journal, *(ours(seq, json.dumps("x" * (seq * 7 % 200))) for seq in range(1, 101)))
    tape, seqs = Tape(journal, RUN), []
    while lines := tape.read(limit_bytes=64):
        seqs += [line.seq for line in lines]
    assert seqs == list(range(1, 101))


def test_an_unnumbered_line_has_the_time_of_reading_and_a_number_from_its_offset(journal: Path) -> None:
    append(journal, '{"status": {"é": 1}}\r\n', "\n", '{"status":2}\n')
    lines = Tape(journal, RUN).read()
    assert [line.seq - UNNUMBERED for line in lines] == [0, len('{"status": {"é": 1}}\r\n'.encode()) + 1]
    assert json.loads(lines[0].text) == {"é": 1}
    assert lines[0].at_us > 1_700_000_000_000_000


def test_a_tape_that_counts_numbers_lines_itself(journal: Path) -> None:
    append(journal, '{"status":1}\n', ours(900), "nonsense\n", '{"status":2}\n')
    tape = Tape(journal, RUN, lines=10, counts_lines=True)
    assert [(line.seq, line.kind) for line in tape.read()] == [
        (11, "status"), (12, "status"), (13, "torn"), (14, "status"),
    ]  # fmt: skip
    assert tape.lines == 14


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[1]",
        "5",
        "{}",
        '{"seq":1,"t":1.0}',
        '{"seq":1,"t":1.0,"ack":"x"}',
        '{"seq":1,"t":1.0,"ack":-5}',
        '{"seq":1,"t":1.0,"status":NaN}',
        '{"seq":1,"t":1.0,"status":{"a":Infinity}}',
        '{"seq":1,"t":1.0,"status":{"a":1}',
        '{"seq":1,"t":1.0,"status":{"a":1}}}',
        '{"seq":1,"t":1.0,"status":1e999} x',
        '{"seq":1,"t":1.0,"status":' + "9" * 5000 + "}",
        '{"status":' + "[" * 100_000 + "}",
        '{"status":"\udc80"}',
        "\0\0\0",
    ],
)
def test_a_line_of_another_form_is_kept_as_torn_with_its_text(journal: Path, text: str) -> None:
    append(journal, text.encode("utf-8", "surrogateescape") + b"\n", ours(2))
    lines = Tape(journal, RUN).read()
    assert [line.kind for line in lines] == ["torn", "status"]
    assert lines[0].text.startswith(text[:5].replace("\udc80", ""))


@pytest.mark.parametrize("seq", ["true", '"3"', "-1", "1.5", "99999999999999999999", "null"])
@pytest.mark.parametrize("at", ["null", '"now"', "-1", "1e300", "9" * 400, "true"])
def test_a_strange_number_or_time_is_replaced(journal: Path, seq: str, at: str) -> None:
    append(journal, f'{{"seq":{seq},"t":{at},"status":1}}\n')
    (line,) = Tape(journal, RUN).read()
    assert (line.seq, line.kind) == (UNNUMBERED, "status")
    assert 1_700_000_000_000_000 < line.at_us < 1 << 62


@pytest.mark.parametrize("counts_lines", [False, True])
def test_a_status_too_deep_for_whoever_reads_it_later_is_torn(journal: Path, counts_lines: bool) -> None:
    deep, wide = "[" * 201 + "]" * 201, json.dumps([["[" * 300]] * 300)
    foreign = json.dumps({"status": json.loads(deep)}) + "\n"
    append(journal, ours(1, deep), ours(2, wide), foreign, ours(3))
    lines = Tape(journal, RUN, counts_lines=counts_lines).read()
    assert [line.kind for line in lines] == ["torn", "status", "torn", "status"]


def test_a_record_glued_behind_a_torn_line_is_found(journal: Path) -> None:
    append(journal, '{"seq":4,"t":1700000000.1,"status":{"a":{"seq":1', ours(5, '{"seq":9}'), ours(6))
    assert said(Tape(journal, RUN).read()) == [
        (UNNUMBERED, "torn", '{"seq":4,"t":1700000000.1,"status":{"a":{"seq":1'),
        (5, "status", '{"seq":9}'),
        (6, "status", '{"n":1}'),
    ]


def test_records_glued_together_are_both_found(journal: Path) -> None:
    append(journal, ours(4)[:-1], ours(5))
    assert said(Tape(journal, RUN).read()) == [(4, "status", '{"n":1}'), (5, "status", '{"n":1}')]


def test_a_line_without_an_end_waits_until_it_has_one_or_the_run_has_ended(journal: Path) -> None:
    append(journal, ours(1), ours(2)[:-10])
    tape = Tape(journal, RUN)
    assert [line.seq for line in tape.read()] == [1]
    assert tape.read() == []
    append(journal, ours(2)[-10:], '{"seq":3,"t":17')
    assert [line.seq for line in tape.read()] == [2]
    assert said(tape.read(final=True)) == [(UNNUMBERED + 2 * len(ours(1)), "torn", '{"seq":3,"t":17')]
    assert (tape.read(final=True), tape.backlog_bytes()) == ([], 0)


def test_a_last_line_that_lacks_only_its_newline_is_no_torn_one(journal: Path) -> None:
    append(journal, ours(1)[:-1])
    assert said(Tape(journal, RUN).read(final=True)) == [(1, "status", '{"n":1}')]


@pytest.mark.parametrize("limit_bytes", [1 << 10, 1 << 20, 8 << 20])
def test_a_line_over_a_mebibyte_is_torn_and_only_its_beginning_kept(journal: Path, limit_bytes: int) -> None:
    append(journal, ours(1), '{"seq":2,"t":1.0,"status":"' + "x" * (3 << 20))
    tape, lines = Tape(journal, RUN), []
    for _ in range(5):
        lines += tape.read(limit_bytes)
    assert [line.seq for line in lines] == [1]
    append(journal, '"}\n', ours(3))
    while more := tape.read(limit_bytes):
        lines += more
    assert [line.kind for line in lines] == ["status", "torn", "status"]
    assert len(lines[1].text) == TORN_BYTES
    assert lines[2].seq == 3


def test_a_journal_written_anew_is_read_from_its_beginning(journal: Path) -> None:
    append(journal, ours(1), ours(2))
    tape = Tape(journal, RUN)
    tape.read()
    journal.write_text(ours(3))
    assert [line.seq for line in tape.read()] == [3]


def test_space_given_back_is_free_and_offsets_stay(journal: Path) -> None:
    append(journal, *(ours(seq, json.dumps("x" * 1000)) for seq in range(1, 1001)))
    before, tape = os.stat(journal), Tape(journal, RUN)
    tape.read(600_000)
    tape.give_back(tape.offset)
    after = os.stat(journal)
    assert after.st_size == before.st_size
    assert after.st_blocks < before.st_blocks / 2
    stored = tape.lines
    assert [line.seq for line in Tape(journal, RUN, offset=tape.offset).read()] == list(range(stored + 1, 1001))


def test_space_that_could_not_be_given_back_is_given_back_later(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(journal, *(ours(seq, json.dumps("x" * 1000)) for seq in range(1, 1001)))
    before, tape = os.stat(journal), Tape(journal, RUN)
    tape.read(600_000)
    with monkeypatch.context() as failing:
        failing.setattr("harnessd.server.tape._FALLOC_FL_PUNCH_HOLE", 1 << 30)  # a mode that no filesystem knows
        tape.give_back(tape.offset)
    assert os.stat(journal).st_blocks == before.st_blocks
    tape.give_back(tape.offset)
    assert os.stat(journal).st_blocks < before.st_blocks / 2


def test_a_tape_whose_offset_is_lost_begins_behind_the_hole(journal: Path) -> None:
    append(journal, *(ours(seq, json.dumps("x" * 1000)) for seq in range(1, 1001)))
    tape = Tape(journal, RUN)
    tape.read(600_000)
    tape.give_back(tape.offset)
    lines = Tape(journal, RUN).read()
    assert [line.kind for line in lines[:2]] == ["torn", "status"]  # the hole ends amid a line
    assert lines[1].seq <= tape.lines
    assert lines[-1].seq == 1000


def test_space_that_was_not_read_is_never_given_back(journal: Path) -> None:
    append(journal, *(ours(seq, json.dumps("x" * 1000)) for seq in range(1, 1001)))
    tape = Tape(journal, RUN)
    tape.give_back(1 << 40)
    assert [line.seq for line in tape.read(2 << 20)] == list(range(1, 1001))


def test_rewound_lines_are_read_again(journal: Path) -> None:
    append(journal, ours(1), ours(2))
    tape = Tape(journal, RUN, counts_lines=True)
    first = tape.read()
    tape.rewind(0, 0)
    assert tape.read() == first


def test_overlong_lines_that_are_read_again_take_none_with_them(journal: Path) -> None:
    append(journal, "x" * MAX_LINE_BYTES + "x\n", ours(1), "y" * (MAX_LINE_BYTES + 9))  # the last is not whole yet
    tape = Tape(journal, RUN)
    first = [tape.read(), tape.read(), tape.read()]
    tape.rewind(0, 0)
    again = [tape.read(), tape.read(), tape.read()]
    assert [[line.kind for line in lines] for lines in again] == [["torn"], ["status"], []]
    assert first[1] == again[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from([b"\n", b'{"seq":', ours(1).encode(), ours(2)[:-3].encode(), b'{"status":1}\n', b"\0" * 9]),
        ),
        max_size=12,
    ),
    limit_bytes=st.integers(1, 200),
    counts_lines=st.booleans(),
)
def test_any_bytes_become_lines_and_all_is_read(
    tmp_path: Path, pieces: list[bytes], limit_bytes: int, counts_lines: bool
) -> None:
    path = tmp_path / "any"
    path.write_bytes(b"".join(pieces))
    lines = read_all(path, limit_bytes, counts_lines)
    again = read_all(path, 1 << 20, counts_lines)
    assert [line[:2] + line[3:] for line in lines] == [line[:2] + line[3:] for line in again]  # all but the time
    for line in lines:
        assert line.kind == "torn" or json.loads(line.text) is not ...
        line.text.encode()


def read_all(path: Path, limit_bytes: int, counts_lines: bool) -> list[Line]:
    tape, lines = Tape(path, RUN, counts_lines=counts_lines), []
    while more := tape.read(limit_bytes, final=True):
        lines += more
    assert tape.backlog_bytes() == 0
    tape.close()
    return lines


def test_the_quick_way_and_the_careful_way_agree(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(journal, *(ours(seq, json.dumps({"é": seq, "s": '"}'})) for seq in range(1, 50)), ours(50, "1", "ack"))
    quick = Tape(journal, RUN).read()
    monkeypatch.setattr(Tape, "_ours", lambda *_: None)
    careful = Tape(journal, RUN).read()
    assert [line[:4] for line in quick] == [line[:4] for line in careful]
    assert [json.loads(line.text) for line in quick] == [json.loads(line.text) for line in careful]
