"""Files: written whole or not at all, through no planted link; small ones read with a limit."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from melens.errors import OutputError, PolicyError, PromptError, ResultError
from melens.store import (
    ABANDONED,
    Heading,
    KeptRows,
    Refusal,
    RowFormat,
    digest,
    hash_facts,
    hash_file,
    hash_tensors,
    read_limited,
    read_text,
    replacing,
    workspace,
    write_atomically,
    write_folder,
)
from melens.store.disk import stem_of

SRC = Path(__file__).parent.parent / "melens"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_writes_files_by_itself():
    """Replacing, temporary names, hashing and the like stand in melens/store alone."""
    words = ("os.replace", '.tmp"', "NamedTemporaryFile", "mkstemp", ".write_bytes(", "hashlib")
    for path in SRC.rglob("*.py"):
        text = path.read_text("utf-8")
        if path.parent.name != "store":
            for word in words:
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
    (tmp_path / f"{stem_of(tmp_path / 'a.json')}.{'0' * 16}.tmp").symlink_to(victim)
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


HOLD = """
import sys, time
from pathlib import Path
from melens.store import replacing
with replacing(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("1")
    print("here", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_has_is_not(tmp_path):
    target = tmp_path / "models" / "x"
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(target)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(SRC.parent)},
        )
        for _ in range(2)
    ]
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"here\n"
        assert len(names(target.parent)) == 4  # a folder and a lock each
        holders[0].kill()
        holders[0].wait()
        with replacing(target) as folder:
            assert len(names(target.parent)) == 4  # the running one's, and ours
            _fill(folder, "1")
        assert len(names(target.parent)) == 2 + 1
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            holder.stdout.close()
    foreign = target.parent / ".job.0123456789abcdef"  # another program's, with a lock of its own
    foreign.mkdir()
    foreign.with_name(f"{foreign.name}.lock").touch()
    write_folder(target, lambda at: _fill(at, "2"))
    assert names(target.parent) == [foreign.name, f"{foreign.name}.lock", "x"]
    assert (target / "f").read_text() == "2"


@pytest.mark.parametrize("write", [write_atomically, lambda at, _: write_folder(at, Path.stat)])
def test_what_has_no_lock_is_tidied_up_when_it_is_old_enough(write, tmp_path):
    target, other = tmp_path / "out", tmp_path / "other"
    young, old, ours, theirs = (
        tmp_path / f"{stem_of(whose)}.{digit * 16}.{ending}"
        for whose, digit, ending in (
            (target, "0", "tmp"),
            (target, "1", "tmp"),
            (target, "2", "old"),
            (other, "3", "tmp"),
        )
    )
    target.mkdir() if write is not write_atomically else target.touch()
    for path in (young, old, theirs):
        path.touch()
    ours.mkdir()
    _fill(ours, "half")
    for path in (old, theirs, ours, ours / "f"):
        os.utime(path, (time.time() - 2 * ABANDONED,) * 2)
    write(target, "x")
    assert names(tmp_path) == sorted([young.name, theirs.name, "out"])


def test_work_is_private_and_what_is_done_is_as_readable_as_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x") as folder:
            assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
            for name, mode in (("a", 0o600), ("run", 0o700)):
                (folder / name).write_text("1")
                (folder / name).chmod(mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "x" / "a").stat().st_mode) == 0o640
    assert (tmp_path / "x" / "run").stat().st_mode & 0o100


def test_a_work_folder_cannot_be_guessed_nor_lie_there_already(tmp_path, monkeypatch):
    with workspace(tmp_path / "x") as one, workspace(tmp_path / "x") as other:
        assert one != other
        assert len(one.name) == len(stem_of(tmp_path / "x")) + len(f".{'0' * 16}.tmp")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    (tmp_path / f"{stem_of(tmp_path / 'x')}.{'0' * 16}.tmp").symlink_to(elsewhere)
    with pytest.raises(FileExistsError), replacing(tmp_path / "x"):
        pass
    assert not list(elsewhere.iterdir())


def test_a_folder_that_another_process_puts_there_meanwhile_is_replaced_too(tmp_path, monkeypatch):
    target, moved, late = tmp_path / "x", Path.rename, []

    def rename(self, to):
        if self.name == "new" and not late:  # between our two moves
            late.append(target)
            target.mkdir()
            _fill(target, "theirs")
        return moved(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    write_folder(target, lambda at: _fill(at, "ours"))
    assert (target / "f").read_text() == "ours"
    assert names(tmp_path) == ["x"]


def test_a_kill_between_the_two_moves_costs_nothing(tmp_path):
    old = tmp_path / f"{stem_of(tmp_path / 'out')}.{'a' * 16}.old"
    old.mkdir()
    _fill(old, "earlier export")

    def fails(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", fails)
    assert (tmp_path / "out" / "f").read_text() == "earlier export"


def test_long_names_that_begin_alike_do_not_touch_each_others_leftovers(tmp_path):
    first, second = (tmp_path / ("n" * 40 + end) for end in "ab")
    old = tmp_path / f"{stem_of(first)}.{'a' * 16}.old"
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
    from melens.evaluating.tasks import read_jsonl
    from melens.item_rows import Rows, head_of
    from melens.patching.sweep import Cells
    from melens.reporting.card import refuse_bad_card
    from melens.results import load_result
    from melens.settings import Items

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
        (lambda at: read_jsonl(Items(data=at), "x", ["a"]), PromptError),
    ):
        with pytest.raises(error, match=r"regular file|bytes"):
            read(path)
    if kind != "huge":  # of a file of items the head alone is read first
        with pytest.raises(OSError, match="regular file"):
            hash_file(path)
        for read in (head_of, lambda at: Rows(at, {})):
            with pytest.raises((ResultError, OutputError), match="regular file"):
                read(path)


HEAD = '{"key": "k", "schema": "rows/1"}\n'
REFUSED = Refusal("{path} damaged at {line}", "{path} foreign", "{path} of another")


def kept(path: Path, refusal: Refusal | None = REFUSED) -> dict[str, dict]:
    """Rows as melens' own are: named by a field, read from JSON."""
    form = RowFormat(lambda row: row["name"], json.dumps, _row, refusal)
    rows = KeptRows(path, form, Heading("rows/1", "k"))
    rows.add([{"name": "new", "x": 3}])
    return rows.found


def _row(line: str) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict) or "name" not in row:
        raise ValueError(line)
    return row


A, B = (json.dumps({"name": name, "x": 1}) + "\n" for name in "ab")


@pytest.mark.parametrize(
    ("held", "found"),
    [
        (None, []),
        (b"", []),
        (HEAD.encode()[:-1], []),  # nothing is lost where no row is whole
        (HEAD.replace('k"', 'other"').encode() + A.encode()[:-1], []),
        ((HEAD + A + B).encode(), ["a", "b"]),
        ((HEAD + A + B[:9]).encode(), ["a"]),  # a kill in the middle of a line
        ((HEAD + A + "\u00e9").encode()[:-1], ["a"]),  # or of a character
    ],
)
def test_rows_are_taken_up_and_a_torn_line_costs_itself_alone(held, found, tmp_path):
    path = tmp_path / "new" / "rows"
    if held is not None:
        path.parent.mkdir()
        path.write_bytes(held)
    assert list(kept(path)) == [*found, "new"]
    assert list(kept(path, None)) == [*found, "new"]  # and nothing is written twice
    lines = path.read_text().splitlines()
    assert [json.loads(line).get("name") for line in lines] == [None, *found, "new"]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (b"no head\n", "damaged at 1"),
        (b'{"schema": "other/1"}\n', "foreign"),
        ((HEAD.replace('"k"', '"j"') + A).encode(), "of another"),
        ((HEAD + A + "{}\n" + B).encode(), "damaged at 3"),
        (HEAD.encode() + b'{"name": "\xff"}\n', "damaged at 2"),
    ],
)
def test_rows_of_something_else_are_refused_or_begun_anew(held, said, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(held)
    with pytest.raises(ResultError, match=f"rows {said}$"):
        kept(path)
    assert path.read_bytes() == held
    assert list(kept(path, None)) == ["new"]
    assert path.read_text().startswith(HEAD)


def test_hashes_are_sha256_and_never_change(tmp_path):
    """They stand in results and in names of kept files."""
    import torch

    whole = hashlib.sha256("aé".encode()).hexdigest()
    assert digest(["a", "é".encode()], length=64) == whole
    assert digest([memoryview(b"a"), "é"]) == whole[:16]
    (tmp_path / "f").write_text("aé", "utf-8")
    assert hash_file(tmp_path / "f") == whole
    facts = {"b": [1, 2.5, None], "a": {"ä": Path("x")}}
    text = r'{"a": {"\u00e4": "x"}, "b": [1, 2.5, null]}'
    assert hash_facts(facts) == hashlib.sha256(text.encode()).hexdigest()[:16]
    tensor = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16).T
    assert hash_tensors([("w", tensor)]) == digest(["w", b"\x80\x3f\x00\xc0"])
