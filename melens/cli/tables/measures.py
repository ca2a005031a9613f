"""The tables of every kind of result; words, not numbers, are decided here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from melens.cli.listing import Listing, cell, rest, table_of
from melens.formatting import interval_text
from melens.protocols import JsonObject
from melens.results.describe import TokenPortrait
from melens.results.locate import LayerRow, MELayer
from melens.results.sinks import Sinks

if TYPE_CHECKING:
    from melens.results.attention import AttentionMaps
    from melens.results.collapse import Collapse
    from melens.results.known import KnownCheck
    from melens.results.metric import MetricProfile
    from melens.results.mixers import Mixers

MOST_TOKENS = 8
"""Massive tokens that a table lists; the JSON has all."""


@table_of("known")
def _known(result: KnownCheck) -> Iterator[Listing]:
    if result.comparisons:
        yield from held_listings(result)


def held_listings(result: KnownCheck, caption: str = "") -> Iterator[Listing]:
    """Published numbers beside measured ones, their sources, and the convention."""
    sources = list(dict.fromkeys(row.source for row in result.comparisons if row.source))
    rows = []
    for row in result.comparisons:
        made: JsonObject = {"what": row.what, "published": row.published, "measured": row.measured}
        made["verdict"] = row.verdict
        if any(one.off for one in result.comparisons):
            made["off by"] = row.off
        if sources:
            made["source"] = f"[{sources.index(row.source) + 1}]" if row.source else None
        rows.append(made)
    yield Listing(caption, rows)
    if sources:
        yield Listing("\n".join(f"[{i}] {source}" for i, source in enumerate(sources, start=1)))
    yield Listing(result.convention)


@table_of("describe")
def _describe(result: TokenPortrait) -> Iterator[Listing]:
    if result.massive:
        yield Listing("", [_described_row(result, row) for row in result.rows()])
        about = "the first row is the primary token, which all else is about:"
        yield from _massive(result, f"\nMassive tokens; {about}")
        yield Listing(f"\nEnergy at layer {result.peak_layer}: {_energies(result)}")
        if next_norm := _next_norm(result):
            yield Listing(next_norm)
    yield Listing(
        "\nPosition 0, by what stands there:",
        [
            {
                "start": row.name,
                "first tokens": row.first_tokens,
                "massive": row.massive,
                "95 % interval": interval_text(row.interval, ".3f"),
                "median largest |x|": row.median_value,
            }
            for row in result.conditions
        ],
    )
    yield Listing("")


def _massive(result: TokenPortrait | MELayer, caption: str) -> Iterator[Listing]:
    yield Listing(
        caption,
        [
            {
                "position": token.position,
                "token": repr(token.token),
                "dim": token.dim,
                "value": token.value,
                "frequency": token.frequency,
            }
            for token in result.massive[:MOST_TOKENS]
        ],
    )
    yield from rest(MOST_TOKENS, len(result.massive), "massive tokens and dimensions")


def _described_row(result: TokenPortrait, row: JsonObject) -> JsonObject:
    ups = {step.layer for step in result.step_up}
    downs = {step.layer for step in result.step_down}
    layer = row["layer"]
    notes = ["ME Layer"] * (layer == result.me_layer) + ["peak"] * (layer == result.peak_layer)
    notes += ["step up"] * (layer in ups) + ["step down"] * (layer in downs)
    names = {
        "energy_1": "energy in 1",
        "energy_4": "energy in 4",
        "cosine_peak": "cos to peak",
        "cosine_previous": "cos to layer before",
        "cosine_inputs": "cos between inputs",
    }
    return {names.get(name, name): value for name, value in row.items()} | {"": ", ".join(notes)}


def _energies(result: TokenPortrait) -> str:
    assert result.energy is not None  # a massive token has both
    assert result.energy_direction is not None
    shares = ", ".join(f"{100 * share:.1f} % in {top}" for top, share in result.energy.items())
    return (
        f"{shares} coordinates; {100 * result.energy_direction:.2f} % of {result.inputs} "
        "inputs' in one direction."
    )


def _next_norm(result: TokenPortrait) -> str | None:
    """What the first norm after the peak leaves."""
    peak = result.peak_layer
    after = [norm for norm in result.norms if peak is not None and norm.layer == peak + 1]
    if not after:
        return None
    parts = [f"{n.site} {n.before:z.1%} -> {n.after:z.1%}" for n in after]
    return (
        f"Energy in the massive dimensions before -> after the norms of layer {after[0].layer}, "
        f"gains included: {', '.join(parts)}."
    )


@table_of("collapse")
def _collapse(result: Collapse) -> Iterator[Listing]:
    yield Listing(
        "Effective rank exp(H(s / sum s)), uncentred, per sequence and averaged; heads averaged; "
        "in brackets without the massive tokens' rows:",
        result.overview(),
    )
    yield Listing(
        "\nThe same centred (the mean row taken off):", result.overview("effective_rank_centred")
    )
    for line in result.missing:
        yield Listing(f"Not there: {line}.")
    yield Listing(
        f"\n{result.sequences_massive} of {result.sequences} sequences hold a massive token. "
        "Other definitions and single heads: --json, or melens plot --style.\n"
    )


@table_of("sinks")
def _sinks(result: Sinks) -> Iterator[Listing]:
    yield Listing(
        f"Sink^eps of the first token (Gu et al.): share of (sequence, head) with alpha > eps, "
        f"T = {result.t}; uniform attention would give alpha {result.uniform:.3f}:",
        [_sink_row(result, row) for row in result.rows()],
    )
    if result.tokens:
        yield Listing(
            "\nMassive tokens, each apart:",
            [
                {
                    "position": token.position,
                    "token": repr(token.token),
                    "met": token.count,
                    **{f"sink {eps}": rate for eps, rate in token.overall.items()},
                }
                for token in result.tokens[:MOST_TOKENS]
            ],
        )
        yield from rest(MOST_TOKENS, len(result.tokens), "massive tokens")
    yield Listing("")


def _sink_row(result: Sinks, row: JsonObject) -> JsonObject:
    layer = row["layer"]
    notes = ["ME Layer"] * (layer == result.me_layer)
    notes += ["sinks begin"] * (layer == result.onset_layer)
    return {name.replace("_", " "): value for name, value in row.items()} | {"": ", ".join(notes)}


@table_of("mixers")
def _mixers(result: Mixers) -> Iterator[Listing]:
    yield Listing(
        f"Token {result.token!r} at position {result.position} is the sink token of "
        f"{result.texts_with_it} of {result.texts} texts ({result.chosen_by}). Norms are means "
        "over the texts' own sink tokens, largest |x| the largest of them; layers from 0:",
        result.shown(),
    )
    yield Listing(
        f"\nShares of its vector at layer {result.peak_layer}, where its norm peaks (the final "
        f"layers left out; the embedding's: "
        f"{result.embedding_share:.3g}):",
        result.by_kind(),
    )
    for line in result.missing:
        yield Listing(f"Not there: {line}.")
    yield Listing("")


@table_of("attention")
def _attention(result: AttentionMaps) -> Iterator[Listing]:
    yield Listing("", result.rows())


@table_of("locate")
def _locate(result: MELayer) -> Iterator[Listing]:
    yield Listing(
        "Each layer's output, layers from 0; max |x| is over all texts and tokens:",
        [_locate_row(result, row) for row in result.profile],
    )
    if result.massive:
        among = f", the middle one of {result.alike} equally frequent ones" * (result.alike > 1)
        yield from _massive(
            result,
            "\nMassive tokens, each one's own largest entry before the final layers; the first row "
            f"is the primary token{among}; write share, stages and the last sentence are about it:",
        )
    answers = result.criteria.model_dump().items()
    yield Listing("\nCriteria: " + ", ".join(f"{name} {cell(layer)}" for name, layer in answers))
    yield Listing(_stability(result))
    if growth := result.final_layer_growth:
        yield Listing(
            f"Final-layer growth (not emergence): layer {growth.layer}, x{growth.factor:.3g}, "
            f"dimension {growth.dim}."
        )


def _stability(result: MELayer) -> str:
    seen = result.stability
    alone = sum(token.massive for token in seen.first_tokens)
    return (
        f"Massive in {seen.sequences_massive} of {seen.sequences} sequences; of "
        f"{len(seen.first_tokens)} other first tokens tried alone, {alone} turn massive; "
        f"{seen.agreeing} of {seen.observations} independent observations agree."
    )


def _locate_row(result: MELayer, row: LayerRow) -> JsonObject:
    notes = [
        word
        for word, layer in (
            ("ME Layer", result.me_layer),
            ("main step", result.main_layer),
            ("peak", result.peak_layer),
            ("erase", result.erase_layer),
        )
        if layer == row.layer
    ]
    spread = result.cumulative
    notes += [
        f"{part} %"
        for part, layer in ((10, spread.p10), (50, spread.p50), (90, spread.p90))
        if layer == row.layer and spread.p10 != spread.p90
    ]
    notes += [f"stage at {s.layer} erased" for s in result.stages if s.erased_at == row.layer]
    return {
        "layer": row.layer,
        "max |x| (signed)": row.value,
        "position": row.position,
        "dim": row.dim,
        "median |x|": row.median,
        "token's median": row.token_median,
        "norm ratio": row.norm_ratio,
        "write share": None if row.write_share is None else round(row.write_share, 4),
        "": ", ".join(notes),
    }


@table_of("metric")
def _metric(result: MetricProfile) -> Iterator[Listing]:
    yield Listing("", result.rows())
    yield Listing("")
