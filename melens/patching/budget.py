"""How many tokens to run at once: what free memory holds, up to where more is no faster."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from melens.resume import Resumable

CPU_TOKENS = 1024
"""Measured on two cores: from 64 to 2,048 tokens a matrix product runs at one speed; larger waves
leave the cache.
"""
GPU_TOKENS = 65536
LEAST_TOKENS = 128
"""Below it a block spends its time on calls and on reading weights."""
SHARE = 0.3
"""Of the free memory: others run too, and the estimate is rough."""
UNKNOWN_BYTES = 2**31


def tokens_at_once(run: Resumable) -> int:
    """Tokens a wave may have."""
    device = run.batch.ids.device
    fits = int(SHARE * free_bytes(device) / bytes_per_token(run))
    return max(1, min(fits, CPU_TOKENS if device.type == "cpu" else GPU_TOKENS))


def bytes_per_token(run: Resumable) -> int:
    """A block's largest tensors at one moment, per token that it runs."""
    cfg, width = run.model.cfg, run.batch.ids.shape[1]
    hidden = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    heads = cfg.n_heads * cfg.d_head
    # scores and pattern, and the whole sequences' keys and values that a one-token suffix sees
    attention = 3 * cfg.n_heads * width + 4 * heads * width
    return 4 * (8 * cfg.d_model + 4 * hidden + attention)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; 2 GB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return UNKNOWN_BYTES
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return UNKNOWN_BYTES


def fits(task: Callable[[], None]) -> bool:
    """Do ``task``; False where memory ran out. Anything else is raised."""
    try:
        task()
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        if "alloc" not in str(error) or "memory" not in str(error):
            raise
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
