"""MELENS_OFFLINE=1 alone: nothing asks the network, from Python and whatever was imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from melens.network import LIBRARIES, go_offline, is_offline, pass_on

ROOT = Path(__file__).parents[2]
PROBE = """
import os, socket, sys
asked = []
def refuse(*given, **more):
    asked.append(str(given[0]))
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = refuse
socket.socket.connect = refuse
{first}
import melens
from melens.errors import FetchError, ModelNotFoundError
from melens.scanning import scan
from melens.models import load_plain
from melens.streaming.streamed import load_streamed
for ask in (melens.load, load_plain, scan, load_streamed):
    for name in ("nobody/nothing-here", "smollm2-135m", "gpt2"):
        try:
            ask(name)
        except FetchError as error:
            assert "offline was asked for" in str(error), error
assert not asked, asked
print("quiet")
"""


@pytest.mark.parametrize("first", ["", "import transformers, huggingface_hub"])
def test_nothing_is_asked(first, tmp_path):
    """In a process of its own: the libraries look at their variables once."""
    env = {k: v for k, v in os.environ.items() if k not in (*LIBRARIES, "MELENS_OFFLINE")}
    env |= {
        "MELENS_OFFLINE": "1",
        "MELENS_CACHE": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(ROOT),
        "MELENS_ACCEPT_LICENSE": "gemma",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(first=first)], env=env, capture_output=True, text=True
    )
    assert done.stdout == "quiet\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("value", "says"), [("1", True), ("true", True), ("0", False), ("", False)]
)
def test_one_place_decides(value, says, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("MELENS_OFFLINE", value)
    assert is_offline() is says


def test_libraries_are_told(monkeypatch):
    for name in ("MELENS_OFFLINE", *LIBRARIES):
        monkeypatch.delenv(name, raising=False)
    pass_on()
    assert not any(name in os.environ for name in LIBRARIES)
    monkeypatch.setenv("MELENS_OFFLINE", "1")
    pass_on()
    assert all(os.environ[name] == "1" for name in LIBRARIES)
    for name in ("MELENS_OFFLINE", *LIBRARIES):
        monkeypatch.setenv(name, "0")
    go_offline()
    assert is_offline()


def test_nobody_else_reads_the_switches():
    for path in (ROOT / "melens").rglob("*.py"):
        if path.name != "network.py":
            text = path.read_text("utf-8")
            for name in ("MELENS_OFFLINE", "HF_HUB_OFFLINE"):
                assert f'environ.get("{name}' not in text, path
                assert f'environ["{name}' not in text, path
