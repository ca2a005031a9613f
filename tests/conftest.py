"""Shared fixtures. melens is imported inside them: the jaxtyping hook must come first."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))

TINY_LIMIT = 3_000_000
CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"


def pytest_configure(config):
    """Workers share the cores; more threads than cores would spin against each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ.pop("COLUMNS", None)  # a worker's, which would fold what commands print
    if workers > 1:
        import torch

        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for commands that tests start


SLOW = ("weights", "checking", "isolating", "evaluating", "tuning", "locating", "measuring")


def pytest_collection_modifyitems(items):
    """Folders of slow files first, so that at the end no worker is left alone with one."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW)


def pytest_collection_finish():
    """What was imported stays for good: the garbage collector need not walk over it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    from words import tokenizer as made

    return made()


@pytest.fixture(scope="session")
def make_tiny(tokenizer):
    """Builds a family's tiny random model; gains are random too, so that none is 1 by accident."""
    import torch
    from tiny import TINY
    from transformers import AutoModelForCausalLM

    def make(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32):
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(TINY[family]())
        for name, parameter in hf.named_parameters():
            if "norm" in name or ".ln_" in name:
                torch.nn.init.normal_(parameter, 0.3, 0.4)
        assert sum(p.numel() for p in hf.parameters()) < TINY_LIMIT
        return hf.to(dtype).eval()

    return make


def _state(bridge):
    """What a test may have changed for good: weights, hooks, settings."""
    hf = bridge.original_model
    return (
        [(name, p.data_ptr(), p._version, p.requires_grad) for name, p in hf.named_parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in bridge.modules()],
        (hf.config.to_dict(), hf.generation_config.to_dict(), str(vars(bridge.cfg))),
        (bridge.training, hf.training, id(bridge.tokenizer)),
        str(getattr(bridge.tokenizer, "chat_template", None)),
    )


@pytest.fixture(scope="session")
def _bridges():
    return {}


@pytest.fixture
def bridged(make_tiny, _bridges):
    """Tiny models under a bridge, made and checked once a session; one that a test changed goes."""
    from melens.models import load

    used = set()

    def get(family, *, tokenizer=None, **options):
        key = (family, id(tokenizer), *sorted(options.items()))
        if key not in _bridges:
            bridge = load(make_tiny(family, **options), tokenizer=tokenizer)
            _bridges[key] = (bridge, _state(bridge))
        used.add(key)
        return _bridges[key][0]

    yield get
    for key in used:
        bridge, before = _bridges[key]
        if _state(bridge) != before:
            del _bridges[key]


@pytest.fixture
def tiny(bridged, tokenizer):
    """A bridged tiny Llama."""
    return bridged("llama", tokenizer=tokenizer)


@pytest.fixture
def ids():
    import torch

    return torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def smol():
    """SmolLM2-135M; without its weights this fails and says how to get them."""
    from melens.models import load

    return load("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def gemma():
    """Gemma-3-270M; needs the licence accepted (see the marker's text)."""
    from melens.models import load

    return load("gemma3-270m", device="cpu")


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory):
    """Debian's Chromium, started once a session, when a test first asks."""
    started = []

    def get():
        if not started:
            started.append(_start_chromium(tmp_path_factory.mktemp("profile")))
        return started[0]

    yield get
    for driver in started:
        driver.quit()


def _start_chromium(profile):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--window-size=1280,1000",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))


@pytest.fixture
def browser(socket_enabled, _chromium, monkeypatch):
    """A tab of its own, driven over localhost: no setting of another test's; its logs are empty."""
    monkeypatch.setenv("SE_OFFLINE", "true")
    driver = _chromium()
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    for log in ("performance", "browser"):
        driver.get_log(log)
    yield driver
    driver.close()
    driver.switch_to.window(first)
