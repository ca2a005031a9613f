"""What every measure is asked of a family: one function each, "" where it gives what was planted.

"none" says that the model has nothing to measure; any other text is a refusal, with its reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from words import tokenizer

from melens.batches import Batch
from melens.interventions import wemask
from melens.isolating import isolate, super_weights
from melens.locating import locate
from melens.measuring import sinks
from melens.models import load
from melens.models.anatomy import anatomy
from melens.models.bridging import WAYS, checked_bridge
from melens.models.decoder import layer_list
from melens.patching import patch
from melens.scanning import scan
from melens.streaming.streamed import load_streamed

LAYER, DIM = 1, 7
NAMES = dict(zip(WAYS, ("lens", "measured", "unread"), strict=True))


class Family:
    """One family's tiny model, planted, and what was loaded of it so far."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.way = name, folder, ""
        self.planted: Any = None

    @cached_property
    def hf(self) -> Any:
        """The plain model, with the massive token where one can be planted."""
        made = families.tiny(self.name)
        if self.name not in families.NO_PLANT:
            self.planted = families.plant(made, LAYER, DIM)
        return made

    @cached_property
    def ids(self) -> torch.Tensor:
        """Rows that start with the planted token."""
        ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(5))
        ids[:, 0] = 1
        return ids

    @cached_property
    def batches(self) -> list[Batch]:
        """The same, as melens takes them."""
        return [Batch.of(self.ids)]

    @cached_property
    def bridge(self) -> Any:
        """The checked bridge, around a view: the plain model stays plain."""
        bridge, way = checked_bridge(self.hf, tokenizer(), name=self.name)
        self.way = NAMES[way]
        return bridge

    @cached_property
    def located(self) -> Any:
        """What locate finds."""
        return locate(self.bridge, self.batches)

    @cached_property
    def saved(self) -> Path:
        """The model as a folder."""
        self.hf.save_pretrained(self.folder)
        tokenizer().save_pretrained(self.folder)
        return self.folder


def loads(family: Family) -> str:
    """Logits equal the plain model's, rows padded on either side or not at all."""
    ids, bridge = family.ids, family.bridge
    with torch.no_grad():
        plain = family.hf(ids, use_cache=False).logits
        apart = bridge(ids, use_cache=False) - plain
        assert apart.abs().max() <= 1e-4 * plain.abs().max(), "logits differ"
        for side in ("left", "right"):
            wide, mask = padded(ids, side)
            ours = bridge(wide, attention_mask=mask, use_cache=False)
            real = mask.bool()
            ways = ({}, at(family.hf, mask))  # some count positions from the mask by themselves
            found = [family.hf(wide, attention_mask=mask, use_cache=False, **w) for w in ways]
            off = min((ours - out.logits)[real].abs().max() for out in found)
            assert off <= 1e-4 * ours[real].abs().max(), f"logits differ, {side} padding"
    return ""


def at(model: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions that skip padding, as ``generate`` gives them to a model that takes any."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if takes else {}


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with three pad tokens on one side, and their mask."""
    pad = torch.zeros(len(ids), 3, dtype=ids.dtype)
    one = torch.ones_like(ids)
    parts = ([pad, ids], [pad, one]) if side == "left" else ([ids, pad], [one, pad])
    return torch.cat(parts[0], 1), torch.cat(parts[1], 1)


def locates(family: Family) -> str:
    """The planted layer and dimension."""
    found = family.located
    if family.planted is None:
        return "none"
    assert found.me_layer == LAYER, f"ME Layer {found.me_layer}"
    assert found.massive[0].dim == DIM, f"dimension {found.massive[0].dim}"
    return ""


def reads_attention(family: Family) -> str:
    """Sinks of every layer that has attention."""
    parts = anatomy(family.bridge)
    if not any(block.attention or block.unread for block in parts.blocks):
        return "none"
    sinks(family.bridge, None, family.batches)
    return ""


def masks(family: Family) -> str:
    """A mask by gains changes the plain model and its bridge alike."""
    family.bridge  # noqa: B018 (a refusal is load's)
    if not any(block.attention or block.unread for block in anatomy(family.bridge).blocks):
        return "none"
    made, blocks = [], anatomy(family.bridge).blocks
    layers = tuple(block.layer for block in blocks if block.attention or block.unread)
    for model in (family.bridge, family.hf):
        with wemask(model, layers=layers, rate=0.25, select="gamma"), torch.no_grad():
            out = model(family.ids, use_cache=False)
        made.append(out if isinstance(out, torch.Tensor) else out.logits)
    assert (made[0] - made[1]).abs().max() <= 1e-4 * made[1].abs().max(), "two different masks"
    with torch.no_grad():
        plain = family.hf(family.ids, use_cache=False).logits
        assert not torch.equal(made[1], plain), "the mask changes nothing"
        usual = other_ways(family)
        with wemask(family.hf, layers=layers, rate=0.25, select="gamma"):
            masked = other_ways(family)
    for way, found in usual.items():  # only where the plain model itself gives the same
        wanted = plain[:, -1] if way != "one row" else plain[:1, -1]
        if close(found, wanted):
            under = made[1][:, -1] if way != "one row" else made[1][:1, -1]
            assert close(masked[way], under), f"the mask, {way}, is another one"
    return ""


def other_ways(family: Family) -> dict[str, torch.Tensor]:
    """Logits of the last token: of one row alone, padded on the left, from a cache."""
    hf, ids = family.hf, family.ids
    wide, mask = padded(ids, "left")
    found = {
        "one row": hf(ids[:1], use_cache=False).logits[:, -1],
        "padded": hf(wide, attention_mask=mask, use_cache=False, **at(hf, mask)).logits[:, -1],
    }
    start = hf(ids[:, :-1], use_cache=True)
    for name in ("past_key_values", "cache_params"):
        if (cache := getattr(start, name, None)) is not None:
            options = {name: cache, "use_cache": True}
            found["cached"] = hf(ids[:, -1:], **options).logits[:, -1]
    return found


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for sums in another order."""
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max())


def patches(family: Family) -> str:
    """Every cell is a plain run of the plain model with one position of one block replaced."""
    clean, corrupted = family.ids[:1], family.ids[1:2]
    found = patch(
        family.bridge,
        Batch.of(clean),
        Batch.of(corrupted),
        sites="resid_post",
        metric="loss",
        layers=[LAYER],
    )
    seen: list[torch.Tensor] = []
    run_with(family.hf, clean, lambda out: seen.append(out.clone()))
    for row in found.rows():
        at = row["position"]

        def put_in(out: torch.Tensor, at: int = at) -> torch.Tensor:
            made = out.clone()
            made[:, at] = seen[0][:, at]
            return made

        logits = run_with(family.hf, corrupted, put_in)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], corrupted[0, 1:]).item()
        assert row["value"] == pytest.approx(loss, rel=1e-4), f"position {at}"
    return ""


@torch.no_grad()
def run_with(
    model: Any, ids: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor:
    """Logits of a plain model under a change of what block LAYER gives."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        made = change(out[0] if isinstance(out, tuple) else out)
        return made if made is None or not isinstance(out, tuple) else (made, *out[1:])

    handle = layer_list(model)[LAYER].register_forward_hook(hook)
    try:
        return model(ids, use_cache=False).logits
    finally:
        handle.remove()


def isolates(family: Family) -> str:
    """The planted neuron makes the coordinate."""
    if family.planted is None:
        return "none"
    found = isolate(family.bridge, family.located, family.batches, ffn_edit=edit_of(family))
    assert found.layer == LAYER
    if found.neurons:
        assert found.neurons[0].neuron == family.planted.neuron, f"neuron {found.neurons[0].neuron}"
        return ""
    if found.experts:
        top = next(row for row in found.experts if row.layer == LAYER)
        made = (family.planted.expert, family.planted.neuron)
        assert made[0] is None or (top.expert, top.neuron) == made, f"{top}"
        return ""
    return "; ".join(found.missing) or "no neurons"


def edit_of(family: Family) -> str:
    """Neurons where they can be told apart, else the whole write."""
    from melens.errors import SiteError
    from melens.models.ffn import ffn_of

    try:
        ffn_of(family.bridge, LAYER)
    except SiteError:
        return "drop"
    return "neurons"


def finds_super_weights(family: Family) -> str:
    """The planted column, of the planted expert, where one stands out at all."""
    if family.planted is None:
        return "none"
    found = super_weights(family.bridge, family.batches)
    places = [(row.layer, row.expert, row.column) for row in found.super_weights]
    planted = (LAYER, family.planted.expert, family.planted.neuron)
    if not places:
        lines = [line for line in found.missing if f"layer {LAYER}" in line]
        return "; ".join(lines) or "what is planted does not pass its thresholds"
    assert planted in places, f"found {places}, planted {planted}"
    return ""


def scans(family: Family) -> str:
    """The weights alone predict the planted layer."""
    family.bridge  # noqa: B018
    found = scan(family.saved, reach=False)
    if family.planted is None:
        return "none"
    reasons = [row.reason for row in found.profile if row.layer == LAYER and row.reason]
    if reasons and found.me_layer != LAYER:
        return f"layer {LAYER} is not covered: {reasons[0]}"
    assert found.me_layer == LAYER, f"predicts {found.me_layer}"
    return ""


def streams(family: Family) -> str:
    """Blocks from disk give the same profile, but for the last bits of recurrent layers."""
    whole = locate(load(family.saved), family.batches).profile
    again = locate(load_streamed(family.saved), family.batches).profile
    for one, other in zip(whole, again, strict=True):
        for name, value in one.model_dump().items():
            wanted = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-12)
            assert getattr(other, name) == wanted, name
    return ""


MEASURES: dict[str, Callable[[Family], str]] = {
    "load": loads,
    "locate": locates,
    "attention": reads_attention,
    "mask": masks,
    "patch": patches,
    "isolate": isolates,
    "super weights": finds_super_weights,
    "scan": scans,
    "stream": streams,
}
