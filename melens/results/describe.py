"""TokenPortrait: what a model's massive token is like. Layers count from 0, block outputs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import ByLayer, Part, Result

Start = Literal["bos", "text", "chat", "vocabulary"]
TOPS = ("1", "2", "4", "8")
RESID = "resid_post"


class MassiveEntry(Part):
    """A massive token of the texts and one of its massive dimensions."""

    position: int
    """0 for a first token, else the earliest position it was located at."""
    token_id: int
    token: str
    dim: int
    value: float
    """Its largest entry before the final layers, signed, residual units."""
    frequency: float


class StepLayer(Part):
    """A layer at which the token's size changes suddenly."""

    layer: int
    factor: float
    """Norm at this layer's output over the norm before it."""
    write_share: float


class SiteCosines(Part):
    """How constant the token is at one site, by layer."""

    site: str
    """resid_post, or a norm's output (ln1, ln2, and the post-norms where there are)."""
    consecutive: ByLayer
    """Cosine with the layer before, at the same site."""
    inputs: ByLayer
    """Mean cosine between the same token of different inputs; None with fewer than two inputs."""


class NormView(Part):
    """What one norm leaves of the token's massive dimensions."""

    layer: int
    site: str
    before: float
    """Share of the token's energy in its massive dimensions, at the norm's input."""
    after: float
    """The same at its output, gain included."""
    norm_ratio: float
    """The token's norm at the output over the root of d_model: 1 = a norm with gain 1."""


class Coordinate(Part):
    """One coordinate of the token through all layers."""

    dim: int
    values: tuple[float, ...]
    """Signed entry at every layer's output, residual units."""


class FirstTokenRow(Part):
    """A token alone at position 0."""

    sources: tuple[Start, ...]
    """What it stands for: BOS, the texts' own first token, the chat template's, the sample."""
    token_id: int
    token: str
    massive: bool
    value: float
    """Its largest entry before the final layers, signed."""
    first_share: int | None
    """Layer where its own growth first passes a tenth; None where it is not massive."""


class Condition(Part):
    """What becomes of position 0 under one way to start a text."""

    name: str
    """with BOS; texts' own, no BOS; chat template; vocabulary sample."""
    first_tokens: int
    """Distinct first tokens that were tried."""
    massive: int
    interval: tuple[float, float] | None
    """95 % Wilson interval of the massive share, where the tokens are a random sample."""
    median_value: float
    """Median of the largest |x| before the final layers."""


class TokenPortrait(Result):
    """The massive token: its dimensions, its steps, how rigid it is, what sets it off."""

    schema_id: ClassVar[str] = "melens/describe/1"

    kind: Literal["describe"] = "describe"
    schema_: Literal["melens/describe/1"] = Field(default="melens/describe/1", alias="schema")
    me_layer: int | None
    peak_layer: int | None
    n_layers: int
    massive: tuple[MassiveEntry, ...]
    """The first is the primary one, which everything below is about."""
    energy: dict[str, float] | None
    """Share of the primary token's squared norm in its top 1, 2, 4 and 8 coordinates, at the peak
    layer."""
    energy_layers: dict[str, ByLayer] | None
    coordinates: tuple[Coordinate, ...]
    """The dimensions that are largest at any layer, the largest first."""
    energy_direction: float | None
    """Share of the inputs' energy in their top singular direction, at the peak layer."""
    inputs: int
    """Distinct massive inputs behind ``energy_direction`` and the cosines between inputs."""
    step_up: tuple[StepLayer, ...]
    step_down: tuple[StepLayer, ...]
    cosine_layers: ByLayer
    """Cosine of the residual with its direction at the peak layer."""
    cosine_inputs: ByLayer
    """Mean pairwise cosine between different inputs' massive tokens, at the residual."""
    sites: tuple[SiteCosines, ...]
    norms: tuple[NormView, ...]
    missing: tuple[str, ...]
    """What this model does not show, with the reason."""
    conditions: tuple[Condition, ...]
    first_tokens: tuple[FirstTokenRow, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> TokenPortrait:
        """Refuse what no run can have made."""
        found = self.me_layer is not None
        if bool(self.massive) != found or (self.energy is not None) != found:
            raise ValueError("ME Layer, massive tokens and energy must go together")
        wanted = self.n_layers if found else 0
        curves = [self.cosine_layers, self.cosine_inputs, *(self.energy_layers or {}).values()]
        curves += [curve for site in self.sites for curve in (site.consecutive, site.inputs)]
        curves += [row.values for row in self.coordinates]
        lengths = {len(curve) for curve in curves} - ({0} if not found else set())
        if lengths != ({wanted} if found else set()):
            raise ValueError("curves must have one entry a layer, none without a massive token")
        if found and (
            set(self.energy or ()) != set(TOPS) or set(self.energy_layers or ()) != set(TOPS)
        ):
            raise ValueError(f"energy and energy_layers must hold the tops {', '.join(TOPS)}")
        if found and RESID not in [site.site for site in self.sites]:
            raise ValueError(f"sites must hold {RESID}")
        if not self.conditions or not self.first_tokens:
            raise ValueError("at least one first token must have been tried")
        return self

    def rows(self) -> list[JsonObject]:
        """The primary token by layer; the first tokens where nothing is massive."""
        if not self.massive or self.energy_layers is None:
            return [row.model_dump() for row in self.first_tokens]
        resid = next(site for site in self.sites if site.site == RESID)
        return [
            {
                "layer": layer,
                "energy_1": self.energy_layers["1"][layer],
                "energy_4": self.energy_layers["4"][layer],
                "cosine_peak": self.cosine_layers[layer],
                "cosine_previous": resid.consecutive[layer],
                "cosine_inputs": self.cosine_inputs[layer],
            }
            for layer in range(self.n_layers)
        ]

    def summary(self) -> str:
        """One plain sentence; layers count from 0."""
        tried = [row for row in self.conditions if row.name == "vocabulary sample"]
        sample = "".join(
            f"; {row.massive} of {row.first_tokens} sampled first tokens turn massive"
            for row in tried
        )
        if not self.massive or self.energy is None:
            return f"{self.run.subject}: no massive token to describe{sample}."
        first = self.massive[0]
        rigid = self._rigid()
        return (
            f"{self.run.subject}: token {first.token!r} at position {first.position}, dimension "
            f"{first.dim} reaches {first.value:,.0f}; {100 * self.energy['1']:.1f} % of its energy "
            f"at layer {self.peak_layer} (counted from 0) is in one coordinate; {rigid}{sample}."
        )

    def _rigid(self) -> str:
        """The stretch around the peak over which the direction does not change."""
        assert self.peak_layer is not None
        low = high = self.peak_layer
        while low > 0 and (self.cosine_layers[low - 1] or 0) > RIGID_COSINE:
            low -= 1
        while high + 1 < self.n_layers and (self.cosine_layers[high + 1] or 0) > RIGID_COSINE:
            high += 1
        return f"cosine with its peak direction above {RIGID_COSINE} over layers {low} to {high}"


RIGID_COSINE = 0.99
