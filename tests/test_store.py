"""Files: written whole or not at all, through no planted link; small ones read with a limit."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from melens.errors import OutputError, PolicyError, PromptError, ResultError
from melens.store import ABANDONED, _stem, read_limited, read_text, write_atomically, write_folder

SRC = Path(__file__).parent.parent / "melens"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_writes_files_by_itself():
    """Replacing, temporary names and the like stand in store.py (and where models are fetched)."""
    elsewhere = {"store.py", "cache.py"}
    for path in SRC.rglob("*.py"):
        text = path.read_text("utf-8")
        if path.name not in elsewhere:
            for word in ("os.replace", '.tmp"', "NamedTemporaryFile", "mkstemp", ".write_bytes("):
                assert word not in text, (path, word)


def test_a_file_is_new_and_readable_as_any_other(tmp_path):
    write_atomically(tmp_path / "sub" / "ä.json", "one")
    write_atomically(tmp_path / "sub" / "ä.json", b"two")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert (tmp_path / "sub" / "ä.json").read_text() == "two"
    assert names(tmp_path / "sub") == ["ä.json"]
    assert (tmp_path / "sub" / "ä.json").stat().st_mode == plain.stat().st_mode
    plain.chmod(0o600)
    write_atomically(plain, "secret")
    assert stat.S_IMODE(plain.stat().st_mode) == 0o600
    write_atomically(tmp_path / ("n" * 250), "long names too")


def test_the_temporary_name_is_unguessable_and_exclusive(tmp_path, monkeypatch):
    seen, opened = [], os.open

    def watch(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            seen.append((Path(path), flags))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", watch)
    for _ in range(2):
        write_atomically(tmp_path / "a.json", "x")
    (first, flags), (second, _) = seen
    assert first != second
    assert str(os.getpid()) not in first.name.split(".")
    assert flags & os.O_EXCL  # which follows no link either
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)  # were it guessed after all
    (tmp_path / f"{_stem(tmp_path / 'a.json')}.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(OutputError, match=r"cannot write .*a\.json: File exists"):
        write_atomically(tmp_path / "a.json", "y")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "x"


def test_data_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_mode))
    moved = Path.replace

    def move(self, target):
        assert [stat.S_ISREG(mode) for mode in done] == [True]
        return moved(self, target)

    monkeypatch.setattr(Path, "replace", move)
    write_atomically(tmp_path / "a", "x")
    assert [stat.S_ISDIR(mode) for mode in done] == [False, True]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("old")
    (tmp_path / "a").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "folder").symlink_to(tmp_path / "real" / "made")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"
    for text in ("1", "2"):
        where = write_folder(tmp_path / "folder", lambda at, text=text: _fill(at, text))
        assert where == tmp_path / "real" / "made"
        assert (tmp_path / "folder").is_symlink()
        assert (tmp_path / "folder" / "f").read_text() == text
    assert names(tmp_path / "real") == ["a", "made"]


def _fill(folder: Path, text: str) -> None:
    (folder / "f").write_text(text)
    (folder / "f").chmod(0o600)


def test_devices_pipes_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in (
        (tmp_path / "pipe", "pipe"),
        (Path("/dev/null"), "device"),
        (tmp_path, "folder"),
    ):
        with pytest.raises(OutputError, match=what):
            write_atomically(path, "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_failing_or_interrupted_folder_leaves_what_was_there(tmp_path):
    write_folder(tmp_path / "out", lambda at: _fill(at, "old"))
    assert (tmp_path / "out" / "f").stat().st_mode & 0o044  # readers may read

    def fails(folder):
        _fill(folder, "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", fails)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "f").read_text() == "old"


def test_what_a_kill_left_is_tidied_up(tmp_path):
    """A process that is killed while it writes; its files go when they are old enough."""
    code = (
        "import os, signal, sys; from pathlib import Path; from melens.store import write_folder\n"
        "def fill(at): (at / 'f').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_folder(Path(sys.argv[1]), fill)"
    )
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", code, str(out)], env={**os.environ, "PYTHONPATH": str(SRC.parent)}
    )
    assert killed.returncode < 0
    (left,) = tmp_path.iterdir()
    other = tmp_path / f"{_stem(tmp_path / 'other')}.{'0' * 16}.tmp"
    other.write_text("not ours to remove")
    write_folder(out, lambda at: _fill(at, "1"))
    assert left.exists()  # it may still be at work
    for path in (left, left / "f", other):
        os.utime(path, (time.time() - 2 * ABANDONED,) * 2)
    write_folder(out, lambda at: _fill(at, "2"))
    assert names(tmp_path) == [other.name, "out"]


def test_a_kill_between_the_two_moves_costs_nothing(tmp_path):
    old = tmp_path / f"{_stem(tmp_path / 'out')}.{'a' * 16}.old"
    old.mkdir()
    _fill(old, "earlier export")

    def fails(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", fails)
    assert (tmp_path / "out" / "f").read_text() == "earlier export"


def test_long_names_that_begin_alike_do_not_touch_each_others_leftovers(tmp_path):
    first, second = (tmp_path / ("n" * 40 + end) for end in "ab")
    old = tmp_path / f"{_stem(first)}.{'a' * 16}.old"
    old.mkdir()
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)
    write_folder(second, lambda at: _fill(at, "1"))
    assert names(tmp_path) == sorted([old.name, second.name])
    assert (second / "f").stat().st_mode & 0o777 == second.stat().st_mode & 0o666


def test_a_small_file_costs_its_own_size_whatever_the_limit(tmp_path):
    (tmp_path / "small").write_bytes(b"12345")
    tracemalloc.start()
    assert read_limited(tmp_path / "small", 10**9) == b"12345"
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_only_regular_files_of_a_bearable_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(10**12)  # a hole: no byte of it is on disk, and none may be read
    for path, what in (
        (tmp_path / "pipe", "pipe"),
        (Path("/dev/zero"), "device"),
        (tmp_path, "folder"),
        (huge, "1,000,000,000,000 bytes"),
        (tmp_path / "none", "No such file"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(ResultError, match=what):
            read_text(path, 100, error=ResultError)
    for name in ("environ", "status"):  # they call themselves regular, and of no bytes
        if (path := Path("/proc/self") / name).exists():
            with pytest.raises(ResultError, match="tells no size"):
                read_text(path, 10**9, error=ResultError)
    (tmp_path / "empty").touch()
    assert read_text(tmp_path / "empty", 8, error=ResultError) == ""
    small = tmp_path / "small"
    small.write_bytes(b"\xef\xbb\xbf12345")
    assert read_text(small, 8, error=ResultError) == "12345"
    with pytest.raises(OSError, match="at most 7"):
        read_limited(small, 7)
    small.write_bytes(b"ab\xff")
    with pytest.raises(PromptError, match=r"the list .*byte 2 is not UTF-8"):
        read_text(small, 8, error=PromptError, what="the list")


@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_every_small_reader_refuses_what_is_no_small_file(kind, tmp_path):
    from melens.batches import prompts
    from melens.checking.policy import read_policy
    from melens.cli.options import read_edit_file
    from melens.evaluating.scoring import read_prompts
    from melens.evaluating.tasks import Source, read_jsonl
    from melens.item_rows import Rows, head_of
    from melens.patching.sweep import Cells
    from melens.reporting.card import refuse_bad_card
    from melens.results import load_result

    path = tmp_path / "given.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(10**12)
    for read, error in (
        (load_result, ResultError),
        (read_policy, PolicyError),
        (prompts, PromptError),
        (read_edit_file, ResultError),
        (read_prompts, PromptError),
        (refuse_bad_card, ResultError),
        (lambda at: Cells(at, "x"), ResultError),
        (lambda at: read_jsonl(Source(data=at), "x", ["a"]), PromptError),
    ):
        with pytest.raises(error, match=r"regular file|bytes"):
            read(path)
    if kind != "huge":  # of a file of items the head alone is read first
        for read in (head_of, lambda at: Rows(at, {})):
            with pytest.raises((ResultError, OutputError), match="regular file"):
                read(path)
