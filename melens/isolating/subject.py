"""What all edited layers of an isolation share: the model, its token, its texts, what is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from melens.errors import SiteError
from melens.inputs import Inputs
from melens.isolating import edits
from melens.isolating.changes import Change
from melens.isolating.finished import Finished
from melens.isolating.neurons import Written, written_at
from melens.isolating.path import sizes_of
from melens.isolating.prefixes import Prefixes
from melens.isolating.sufficiency import has_part
from melens.measuring.located import Located, Progress
from melens.models.anatomy import anatomy
from melens.results import MELayer

MOST_SHARE = 0.9
"""The FFN edit ablates the fewest neurons that make this share of the write."""


@dataclass
class Subject:
    """A located massive token, ready to be edited at any layer."""

    inputs: Inputs
    located: Located
    kind: str
    """Which FFN edit."""
    finished: Finished
    progress: Progress
    missing: list[str] = field(default_factory=list)
    """What could not be measured, and why."""
    done: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        me = self.located.me_layer
        assert me.peak_layer is not None
        self.dim, self.model = me.massive[0].dim, self.inputs.model
        self.blocks = anatomy(self.model).blocks
        self.prefixes = Prefixes(self.inputs, self.located, self.dim, self.finished)
        self.upto = min(me.peak_layer, len(self.blocks) - 1)
        self.written = {block.layer: self._written(block.layer) for block in self.blocks}
        sized = self.kind in ("pull-back", "cap")
        self.sizes = sizes_of(self.inputs, self.located) if sized else {}

    @property
    def me(self) -> MELayer:
        """What was located."""
        return self.located.me_layer

    def tick(self, steps: int = 1) -> None:
        """That many more steps are done."""
        self.done += steps
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    def left(self, layer: int, *chosen: edits.LayerEdit) -> float:
        """Share of the coordinate that edits of one layer leave."""
        self.tick()
        return self.prefixes.left(Change(layer, chosen))

    def can_edit(self, layer: int) -> bool:
        """Whether a block has what the chosen FFN edit changes."""
        needs_neurons = self.kind in ("neurons", "pull-back")
        has = self.written[layer] is not None if needs_neurons else True
        return has and has_part(self.model, layer, "ffn")

    def ffn_change(self, layer: int, neurons: list[int]) -> edits.LayerEdit:
        """The chosen FFN edit."""
        return edits.ffn_edit(self.kind, layer, neurons, self.sizes.get(layer))

    def _written(self, layer: int) -> Written | None:
        try:
            return written_at(self.model, layer, self.prefixes)
        except SiteError as error:
            self.missing.append(f"neurons of layer {layer}: {error}")
            return None

    def facts(self) -> dict[str, Any]:
        """What the result says of the model and the texts."""
        return {
            "me_layer": self.me.me_layer,
            "main_layer": self.me.main_layer,
            "peak_layer": self.prefixes.peak,
            "dim": self.dim,
            "n_layers": len(self.blocks),
            "sequences": self.inputs.total,
            "sequences_massive": self.located.sequences_massive,
            "observations": self.prefixes.distinct,
            "observations_used": len(self.prefixes.clean),
        }
