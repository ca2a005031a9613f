"""sidecar(): what quantisers, servers and trainers need of a located model, measured and saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import Reducer, stream
from melens.errors import InterventionError
from melens.inputs import Inputs, Source, prepare
from melens.intervals import random_order
from melens.interventions.massive import FirstRule, IdRule, MassiveRule, massive_tokens
from melens.measuring.located import check_same_model
from melens.metrics.magnitude import SUN_ABSOLUTE, SUN_RATIO
from melens.models.anatomy import resid_post
from melens.protocols import JsonObject, Loadable
from melens.results.locate import MELayer
from melens.results.reading import HoldsMELayer, located_in
from melens.results.scan import WeightScan
from melens.results.sidecar import OutlierDimension, Protected, Sidecar, SidecarLayer
from melens.results.super_weights import SuperWeights
from melens.shapes import Resid, TokenMask
from melens.store import write_atomically

CLIP = 0.999
"""Quantile of ordinary tokens to which a massive dimension is cut."""
BROAD, NEARLY_ALL = 10.0, 0.9
"""A dimension is an outlier of its own class where |x| is over BROAD times the median |x| of all
dimensions on at least NEARLY_ALL of the ordinary tokens."""
MOST_FLOATS, FEWEST_TOKENS = 2**28, 1000
"""Of ordinary tokens whole rows are kept of all layers for medians and ``clip``: at most a GiB, and
at least so many tokens. Of more texts these tokens are drawn; thresholds are of all tokens."""
MASK_FILE = Path(__file__).with_name("massive_mask.py")
"""The reader that needs neither melens nor TransformerLens."""


def sidecar(
    model: Loadable | Inputs,
    me_layer: HoldsMELayer,
    texts: Source = None,
    *,
    scan: WeightScan | None = None,
    super_weights: SuperWeights | None = None,
) -> Sidecar:
    """Measure, layer by layer, how massive tokens are told from others, and what makes them.

    At the ME Layer's output the rule is melens' own (:class:`MassiveRule`). At every other layer
    the threshold lies between the largest ordinary and the smallest massive |x[dim]| of the
    reference texts, on a log scale; there is none where these overlap, or where massive tokens
    are not massive by Sun's rule (100 and 1000 times the median |x|).

    Args:    me_layer: what ``locate`` or a check gave for this model. texts: reference texts.
             scan: adds the neurons that make and erase the activation. super_weights: adds those.
    Raises:  InterventionError: nothing massive was located, or no text holds a massive token.
    """
    located = located_in(me_layer)
    if located is None:
        raise InterventionError("a sidecar describes a located ME Layer; call melens.locate first.")
    ready, rule = prepare(model, texts), MassiveRule.of(located)
    check_same_model(ready, located)
    _check_of_this_model(ready, scan, super_weights)
    firsts, ids = FirstRule.of(located), IdRule.of(located)
    n_layers, kept = ready.model.cfg.n_layers, _sizes(ready, located, rule.dim)
    ordinary, rows = kept[0].ordinary, sum(map(len, kept[0].others))
    if not rows:
        raise InterventionError("every token of these texts is massive; give longer texts.")
    if not kept[0].massive:
        raise InterventionError(
            f"no text holds a massive token of {located.run.model}; give texts that begin as those "
            "it was located on (--bos, --chat)."
        )
    protected = [*_of_scan(scan), *_of_search(super_weights)]
    run = ready.run_info(seed=0)
    return Sidecar(
        model=run.model,
        revision=run.model_revision,
        weights=run.weights,
        n_layers=n_layers,
        d_model=ready.model.cfg.d_model,
        me_layer=rule.layer,
        peak_layer=located.peak_layer,
        erase_layer=located.erase_layer,
        dim=rule.dim,
        first_ids=tuple(i for i, massive in firsts.known if massive is not firsts.others),
        other_first_tokens=firsts.others,
        anywhere_ids=ids.later,
        layers=_layers(kept, rule),
        outlier_dimensions=tuple(_outliers(kept)),
        protected=tuple(protected),
        experts=tuple(dict.fromkeys(one.expert for one in protected if one.expert is not None)),
        tokens=ordinary + len(kept[0].result()),
        massive_tokens=len(kept[0].result()),
        sampled_tokens=None if rows == ordinary else rows,
        run=run,
    )


def _check_of_this_model(
    ready: Inputs, scan: WeightScan | None, found: SuperWeights | None
) -> None:
    """Refuse what was found in another model.

    Raises:  InterventionError: naming both.
    """
    n_layers, width = ready.model.cfg.n_layers, ready.model.cfg.d_model
    if scan is not None and (scan.n_layers, scan.d_model) != (n_layers, width):
        raise InterventionError(
            f"the scan is of a model with {scan.n_layers} layers of width {scan.d_model}; this one "
            f"has {n_layers} of {width}. Scan this model."
        )
    if found is not None and found.run.weights != ready.weights:
        raise InterventionError(
            f"the super weights are of {found.run.model} with other weights; search this model."
        )


def _sizes(ready: Inputs, located: MELayer, dim: int) -> list[LayerSizes]:
    """All layers' tokens, on the CPU; memory does not grow with whole rows of all texts."""
    cfg = ready.model.cfg
    kept = [LayerSizes(dim) for _ in range(cfg.n_layers)]
    total = sum(int(batch.mask.sum()) for batch in ready.batches)
    drawn = _drawn(total, max(FEWEST_TOKENS, MOST_FLOATS // (cfg.n_layers * cfg.d_model)))
    marked = massive_tokens(ready.model, located, ready.batches)
    for batch, (marks, _) in zip(ready.batches, marked, strict=True):
        here, drawn = drawn.split([int(batch.mask.sum()), len(drawn) - int(batch.mask.sum())])
        for sizes in kept:
            sizes.marks, sizes.drawn = marks, here
        taps: dict[str, Reducer] = {resid_post(at): sizes for at, sizes in enumerate(kept)}
        stream(ready.model, [batch], taps)
    return kept


def _drawn(total: int, most: int) -> Bool[Tensor, " token"]:
    """``most`` of so many tokens, the same ones each time; all where there are no more."""
    made = torch.zeros(total, dtype=torch.bool)
    made[random_order(total, seed=0)[:most]] = True
    return made


@dataclass
class LayerSizes:
    """What one layer's output looks like on massive and on ordinary tokens."""

    dim: int
    massive: list[Float[Tensor, "massive d_model"]] = field(default_factory=list)
    others: list[Float[Tensor, "other d_model"]] = field(default_factory=list)
    """The drawn ones. Half precision would round a limit: float32."""
    seen: list[Float[Tensor, "2 ordinary"]] = field(default_factory=list)
    """|x[dim]| and norm of every ordinary token."""
    marks: TokenMask | None = None
    """Massive tokens of the batch that comes next."""
    drawn: Bool[Tensor, " token"] | None = None
    """Which of its tokens, padding left out, are kept whole if they are ordinary."""

    def update(self, x: Resid, batch: Batch) -> None:
        """Keep one batch's tokens, massive and others."""
        assert self.marks is not None
        assert self.drawn is not None
        rows = x.detach()[batch.mask.to(x.device)].float().cpu()
        here = self.marks.cpu()[batch.mask.cpu()]
        self.massive += [rows[here]] if here.any() else []
        self.others.append(rows[self.drawn & ~here])
        self.seen.append(self._sizes_of(rows[~here]))

    @property
    def ordinary(self) -> int:
        """Ordinary tokens that were seen."""
        return sum(sizes.shape[1] for sizes in self.seen)

    def result(self) -> Float[Tensor, "token d_model"]:
        """The massive ones."""
        return torch.cat(self.massive)

    def row(self, layer: int, rule: MassiveRule) -> SidecarLayer:
        """Thresholds and sizes of this layer."""
        massive, others = self.result(), torch.cat(self.others)
        median = float(others.abs().median())
        typical = massive.median(dim=0).values
        least = max(SUN_ABSOLUTE, SUN_RATIO * median)
        dims = [
            d for d in typical.abs().argsort(descending=True).tolist() if abs(typical[d]) > least
        ]
        sizes = self._sizes_of(massive), torch.cat(self.seen, dim=1)
        coordinate, norm = self._threshold(layer, rule, sizes, least)
        where = dims or [self.dim]
        return SidecarLayer(
            layer=layer,
            coordinate=coordinate,
            norm=norm,
            dims=tuple(dims),
            values=tuple(float(typical[d]) for d in dims),
            clip=_quantile(others[:, where].abs().flatten(), CLIP),
            told=None if coordinate is None else _told(coordinate, norm, *sizes),
        )

    def _threshold(
        self, layer: int, rule: MassiveRule, sizes: tuple[Tensor, Tensor], least: float
    ) -> tuple[float | None, float]:
        if layer == rule.layer:
            return rule.coordinate, rule.norm
        low, high = float(sizes[1][0].max()), float(sizes[0][0].min())
        if layer < rule.layer or low >= high or high <= least:
            return None, 0.0
        return max(low * high, 0.0) ** 0.5, 0.0

    def _sizes_of(self, rows: Float[Tensor, "token d_model"]) -> Float[Tensor, "2 token"]:
        return torch.stack([rows[:, self.dim].abs(), rows.norm(dim=-1)])


def _told(
    limit: float, norm: float, massive: Float[Tensor, "2 token"], others: Float[Tensor, "2 other"]
) -> float:
    """Share of the tokens, given as |x[dim]| and norm, of which these limits are right."""
    found = [(x[0] > limit) & (x[1] >= norm) for x in (massive, others)]
    right = int(found[0].sum()) + int((~found[1]).sum())
    return right / (massive.shape[1] + others.shape[1])


def _quantile(values: Float[Tensor, " value"], share: float) -> float:
    """The smallest value with at least that share of them at or below it, whatever their number."""
    return float(values.kthvalue(max(1, math.ceil(share * len(values)))).values)


def _layers(kept: Sequence[LayerSizes], rule: MassiveRule) -> tuple[SidecarLayer, ...]:
    made = [sizes.row(layer, rule) for layer, sizes in enumerate(kept)]
    here = rule.layer < 0  # no residual of the embedding was seen: the rule alone is known
    embedding = SidecarLayer(
        layer=-1,
        coordinate=rule.coordinate if here else None,
        norm=rule.norm if here else 0.0,
        dims=(),
        values=(),
        clip=0.0,
        told=None,
    )
    return (embedding, *made)


def _outliers(kept: Sequence[LayerSizes]) -> Iterable[OutlierDimension]:
    """Dimensions that are large on nearly all ordinary tokens."""
    found: dict[int, list[tuple[int, float]]] = {}
    for layer, sizes in enumerate(kept):
        others = torch.cat(sizes.others).abs()
        median = others.median().clamp_min(torch.finfo(torch.float32).tiny)
        broad = (others > BROAD * median).float().mean(dim=0) >= NEARLY_ALL
        for dim in broad.nonzero().flatten().tolist():
            ratio = float(others[:, dim].median() / median)
            found.setdefault(dim, []).append((layer, ratio))
    for dim, at in sorted(found.items()):
        yield OutlierDimension(
            dim=dim, first_layer=at[0][0], layers=len(at), ratio=max(ratio for _, ratio in at)
        )


def _of_scan(scan: WeightScan | None) -> Iterable[Protected]:
    for one in () if scan is None else scan.candidates:
        if one.role != "other":
            yield Protected(
                layer=one.layer,
                neuron=one.neuron,
                dim=one.dim,
                expert=one.expert,
                why=one.role,
                source="scan",
            )


def _of_search(found: SuperWeights | None) -> Iterable[Protected]:
    for one in () if found is None else found.super_weights:
        layer, row, column = one.at
        yield Protected(
            layer=layer,
            neuron=column,
            dim=row,
            expert=None if one.expert is None else str(one.expert),
            why="super weight",
            source="super-weights",
        )


def write_sidecar(made: Sidecar, path: Path, *, reader: bool = False) -> list[Path]:
    """The JSON, and beside it ``massive_mask.py`` where asked for.

    Returns: the files. Raises: OutputError: they cannot be written.
    """
    write_atomically(path, made.to_json())
    if not reader:
        return [path]
    beside = path.with_name(MASK_FILE.name)
    write_atomically(beside, MASK_FILE.read_text("utf-8"))
    return [path, beside]


def sidecar_schema() -> JsonObject:
    """JSON Schema (draft 2020-12) of a sidecar; docs/sidecar.schema.json is this."""
    made = Sidecar.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
