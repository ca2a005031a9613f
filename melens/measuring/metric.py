"""metric_by_layer(): any registered metric of the residual, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from melens.batches import Batch
from melens.capture import stream
from melens.inputs import Source, prepare
from melens.metrics import METRICS, Metric
from melens.models.anatomy import resid_post
from melens.protocols import ModelLike
from melens.results.metric import MetricProfile, MetricRow
from melens.settings import Progress


@dataclass
class PerSequence:
    """Reducer: a metric of each sequence's rows, padding dropped."""

    metric: Metric
    values: list[float] = field(default_factory=list)

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, pos, d_model]``; the metric sees float32 rows."""
        for rows, mask in zip(x.detach(), batch.mask, strict=True):
            self.values.append(self.metric.fn(rows[mask.to(rows.device)].float()).item())

    def result(self) -> list[float]:
        """One value a sequence, in the order they came."""
        return self.values


def metric_by_layer(
    model: ModelLike,
    name: str,
    prompts: Source = None,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> MetricProfile:
    """A registered metric of every layer's output, one number a sequence; one forward pass.

    Args:    model: anything ``melens.load`` takes.
             name: a metric of ``melens.metrics.METRICS``; your own is registered with ``@metric``.
             prompts: texts, as for ``melens.locate``.
             progress: called with (rows done, rows in all).
    Raises:  UnknownNameError: no such metric. MetricError: it is undefined on these activations.
             PromptError, ModelError: as ``locate``.
    """
    chosen = METRICS[name]
    inputs = prepare(model, prompts, batch_size=batch_size)
    taps = {resid_post(n): PerSequence(chosen) for n in range(inputs.model.cfg.n_layers)}
    stream(inputs.model, inputs.batches, taps, progress=inputs.ticker(progress))
    made = [tap.result() for tap in taps.values()]
    return MetricProfile(
        metric=name,
        unit=chosen.unit,
        sequences=inputs.total,
        profile=tuple(
            MetricRow(layer=layer, mean=sum(sorted(row)) / len(row), values=tuple(row))
            for layer, row in enumerate(made)
        ),
        run=inputs.run_info(seed=0),
    )
