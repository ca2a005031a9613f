"""What number formats cost."""

from __future__ import annotations

from melens.reporting.sections.base import PageBlock, PageView, Picture, Table, section
from melens.results.quantise import Quantisation


@section(
    "quantisation",
    "Number formats",
    "The model rounded as engines would serve it: what each format costs on these texts, and what "
    "is left of the cost where something is kept whole.",
    Quantisation,
)
def quantisation(view: PageView) -> PageBlock:
    """A row a scheme and a thing kept whole."""
    result: Quantisation = view.result
    made = view.block()
    made.pictures = [
        Picture(result, "quantise", result.summary(), "Cost of each scheme, nats a token.")
    ]
    rows = [
        (
            found.scheme if trial.role == "as is" else f"{found.scheme}, kept whole: {trial.name}",
            view.number(f"/schemes/{i}/trials/{n}/damage/value"),
            view.interval(f"/schemes/{i}/trials/{n}/damage/interval")
            if trial.damage.interval
            else "",
            view.number(f"/schemes/{i}/trials/{n}/kl/value"),
            view.number(f"/schemes/{i}/trials/{n}/agreement/value"),
        )
        for i, found in enumerate(result.schemes)
        for n, trial in enumerate(found.trials)
    ]
    columns = ("scheme", "adds (nats a token)", "95 % interval", "KL (nats)", "same first token")
    made.tables = [Table("Schemes", columns, rows)]
    made.notes = [f"Not tried: {reason}" for reason in result.left_out]
    return made
