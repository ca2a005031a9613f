"""The table of quantisation: what each scheme costs, and what keeping something whole buys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from melens.cli.listing import Listing, table_of
from melens.formatting import counted, interval_text
from melens.protocols import JsonObject

if TYPE_CHECKING:
    from melens.results.evaluation import Delta
    from melens.results.quantise import Quantisation, QuantisedTrial


@table_of("quantise")
def _quantise(result: Quantisation) -> Iterator[Listing]:
    texts, tokens = result.texts, result.tokens
    yield Listing(
        f"{tokens:,} tokens of {texts} texts, {result.massive_tokens} of them massive; "
        f"{result.base_loss.value:.4g} nats a token as it is. Costs are nats a token over that, "
        "with 95 % intervals over texts; random rows are means over seeds."
    )
    for found in result.schemes:
        yield Listing(
            f"\n{found.scheme}: {found.about}",
            [_row(rows) for rows in _grouped(found.trials)],
            ("bits", "how many", "agreement", "less", "KL"),
        )
        if found.unrounded:
            yield Listing(f"Not rounded: {', '.join(found.unrounded[:4])}.")
    yield from (Listing(f"\nNot tried: {reason}") for reason in result.left_out)
    yield Listing("")


def _grouped(trials: Sequence[QuantisedTrial]) -> list[list[QuantisedTrial]]:
    """Controls of one protection together, all else alone."""
    made: dict[object, list[QuantisedTrial]] = {}
    for trial in trials:
        made.setdefault((trial.name, trial.control_of), []).append(trial)
    return list(made.values())


def _row(trials: list[QuantisedTrial]) -> JsonObject:
    first, count = trials[0], len(trials)
    alone = count == 1
    mean = sum(trial.damage.value for trial in trials) / count
    shares = [trial.share.value for trial in trials if trial.share is not None]
    return {
        "kept whole": _name(first),
        "how many": _count(first),
        "bits": first.bits,
        "costs": mean,
        "interval": interval_text(first.damage.interval, ".3g", none="") if alone else None,
        "KL": sum(trial.kl.value for trial in trials) / count,
        "agreement": f"{sum(trial.agreement.value for trial in trials) / count:.1%}",
        "less": f"{sum(shares) / count:.0%}" if shares else None,
        "beyond random": _beyond(first.beyond_random),
        "in KL": _beyond(first.kl_beyond_random),
    }


def _name(trial: QuantisedTrial) -> str:
    if trial.role == "as is":
        return "nothing"
    return trial.name if trial.control_of is None else f"random, for {trial.control_of}"


def _count(trial: QuantisedTrial) -> str | None:
    kinds = {"token": trial.tokens, "weight": len(trial.weights), "layer": len(trial.modules)}
    found = [counted(n, kind) for kind, n in kinds.items() if n]
    return found[0] if found else None


def _beyond(found: Delta | None) -> str | None:
    if found is None:
        return None
    said = interval_text(found.interval, ".3g", none="no interval")
    return f"{found.value:.3g} ({said})"
