"""Progress of long work: seen at a terminal, silent elsewhere; small files appear whole."""

import io
import os
import sys

import pytest
from qwen15.progress import byte_bar, human_bytes, human_time, skip
from qwen15.whole_file import write_whole


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_bytes_rate_and_time_left_and_nothing_stays(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with byte_bar("converting", 4_000_000_000) as bar:
        bar.mininterval = 0
        skip(bar, 2_000_000_000)
        bar.update(1_000_000_000)
        shown = bar.format_meter(**{**bar.format_dict, "elapsed": 2.0, "rate": None, "ncols": 100})
        assert bar.n == 3_000_000_000
    assert "converting:  75%" in shown and "3.00G/4.00G" in shown and "500MB/s" in shown and "00:02<00:02" in shown
    assert screen.getvalue().endswith("\r")


def test_what_is_no_terminal_sees_nothing(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with byte_bar("converting", 100) as bar:
        skip(bar, 50)
        bar.update(50)
    assert log.getvalue() == ""


def test_sizes_and_times_read_as_people_write_them():
    assert [human_bytes(n) for n in (812, 3_100_000_000, 2e13)] == ["812 B", "3.10 GB", "20.00 TB"]
    assert [human_time(s) for s in (42, 187, 7500)] == ["42s", "3m07s", "2h05m"]


def test_a_small_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    write_whole(str(path), b"first")
    with pytest.raises(FileExistsError):
        write_whole(str(path), b"second", replace=False)

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_whole(str(path), b"third")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["notes.json"]


def test_a_private_file_is_its_owners_and_others_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        write_whole(str(tmp_path / "mine"), b"", private=True)
        write_whole(str(tmp_path / "ours"), b"")
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("mine", "ours")] == [0o600, 0o644]
