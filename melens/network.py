"""Whether melens may use the network: one place decides for every command and function.

``MELENS_OFFLINE=1`` (or the hub's own ``HF_HUB_OFFLINE=1``) forbids it, as ``--offline`` does.
"""

from __future__ import annotations

import os

SWITCHES = ("MELENS_OFFLINE", "HF_HUB_OFFLINE")
"""Either one is enough."""
LIBRARIES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""What the libraries look at, once, when they are imported."""
_YES = {"1", "true", "yes", "on"}


def is_offline() -> bool:
    """Whether the network is forbidden; then only what is on this machine is used."""
    return any(is_set(name) for name in SWITCHES)


def is_set(name: str) -> bool:
    """Whether an environment variable says yes; ``0`` and ``no`` say no, as an empty one does."""
    return os.environ.get(name, "").strip().lower() in _YES


def go_offline() -> None:
    """Forbid the network for this process and what it starts."""
    os.environ.update(dict.fromkeys(("MELENS_OFFLINE", *LIBRARIES), "1"))


def pass_on() -> None:
    """Tell the libraries what the user told melens; before they are imported, if possible.

    Where they were imported already, melens' own calls still ask for local files only.
    """
    if is_offline():
        os.environ.update(dict.fromkeys(LIBRARIES, "1"))
