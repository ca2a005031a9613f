"""What a sweep patches and what is put in, in which mode and along which axes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from melens.batches import Batch
from melens.errors import PromptError, SiteError
from melens.formatting import brief
from melens.interventions.core import as_index
from melens.patching.sites import BY_HEAD, SITES, PatchPlace
from melens.patching.waves import PatchCell
from melens.registry import Registry
from melens.settings import require_seed

MODES: Registry[str] = Registry("patching mode")
MODES.add("denoising", "a clean activation in the corrupted run: what is enough to restore")
MODES.add("noising", "a corrupted activation in the clean run: what is needed")
MODES.add("mean", "ablation: the site's mean over tokens and sequences, per channel")
MODES.add("resample", "ablation: another sequence's activation at the same position")
PAIRED = ("denoising", "noising")
SWEEPS = (
    ("layer",),
    ("layer", "position"),
    ("layer", "head"),
    ("layer", "position", "head"),
)


@dataclass(frozen=True)
class Sweep:
    """One sweep's choices."""

    sites: str | Sequence[str] = "resid_pre"
    """One site or several, of ``melens.patching.SITES``."""
    metric: object = "kl"
    """A name, one of the metrics of ``melens.patching``, or a function of logits."""
    mode: str | None = None
    """``denoising`` or ``noising`` a pair, ``mean`` or ``resample`` without; None = the first."""
    by: str | Sequence[str] | None = None
    """Axes to sweep, e.g. ``"layer head"``; whole rows are patched along those left out. None =
    layer and position, and head where the site has heads.
    """
    layers: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    """Columns of the batch, counted from 0; None = all."""
    seed: int = 0
    """Chooses the other sequences of ``resample``."""
    paired: bool = True

    def __post_init__(self) -> None:
        require_seed(self.seed)
        for name in ("layers", "positions"):
            given = getattr(self, name)
            if given is not None and not all(as_index(i) is not None for i in _listed(given)):
                raise SiteError(f"{name} must be a list of whole numbers, got {brief(given, 40)}.")
        sites = [self.sites] if isinstance(self.sites, str) else _listed(self.sites)
        object.__setattr__(self, "sites", tuple(dict.fromkeys(sites)))
        object.__setattr__(self, "mode", self.mode or ("denoising" if self.paired else "mean"))
        by = re.split(r"[\s,x]+", self.by) if isinstance(self.by, str) else self.by
        object.__setattr__(self, "by", None if by is None else tuple(by))
        for name in ("layers", "positions"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(sorted(set(given))))
        self._check()

    def axes(self, site: str) -> tuple[str, ...]:
        """The axes swept at a site."""
        return SITES[site].axes if self.by is None else tuple(self.by)

    @property
    def facts(self) -> list[object]:
        """All choices but the metric, as plain values."""
        return [list(self.sites), self.mode, self.by, self.layers, self.positions, self.seed]

    def _check(self) -> None:
        _ = MODES[str(self.mode)]
        if not self.sites:
            raise SiteError(f"no site to patch; choose from {', '.join(SITES)}.")
        if self.paired != (self.mode in PAIRED):
            fitting = [name for name in MODES if (name in PAIRED) == self.paired]
            raise PromptError(
                f"mode '{self.mode}' {'takes no' if self.paired else 'needs a'} corrupted run; "
                f"{'drop corrupted' if self.paired else 'give one'}, or choose "
                f"{' or '.join(fitting)}."
            )
        for name in ("layers", "positions"):
            if getattr(self, name) == ():
                raise SiteError(f"{name} is empty; leave it out to take all.")
        for site in self.sites:
            axes = self.axes(site)
            if axes not in SWEEPS:
                raise SiteError(
                    f"cannot sweep by {' x '.join(axes)!r}; choose "
                    f"{', '.join(repr(' '.join(sweep)) for sweep in SWEEPS)}."
                )
            if "head" in axes and SITES[site].axes != BY_HEAD:
                raise SiteError(f"'{site}' has no heads; sweep it by layer, or layer position.")


def _listed(given: object) -> list[object]:
    """A list of what was given one by one."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        return [given]
    return list(given)


def cells_of(
    choice: Sweep, places: Mapping[str, Sequence[PatchPlace]], batch: Batch
) -> list[PatchCell]:
    """Every patched run of a sweep, site by site.

    Raises:  SiteError: a position that the batch does not have.
    """
    columns = columns_of(choice, batch)
    cells = []
    for site, found in places.items():
        axes = choice.axes(site)
        for place in found:
            heads = range(place.heads or 0) if "head" in axes else (None,)
            if "position" in axes:
                cells += [PatchCell(place, (c,), c, head) for c in columns for head in heads]
            else:
                cells += [PatchCell(place, columns, None, head) for head in heads]
    return cells


def columns_of(choice: Sweep, batch: Batch) -> tuple[int, ...]:
    """The positions patched."""
    width = batch.ids.shape[1]
    if choice.positions is None:
        return tuple(range(width))
    if outside := [p for p in choice.positions if not 0 <= p < width]:
        raise SiteError(
            f"position {outside[0]} is outside 0..{width - 1}: the batch has {width} columns."
        )
    return tuple(choice.positions)
