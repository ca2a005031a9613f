"""reach(): where chosen first tokens go, exactly, by one pass over the weights on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import stream
from melens.errors import PromptError, ResultError, SiteError
from melens.formatting import brief
from melens.models.anatomy import anatomy, resid_post
from melens.models.loading import adopt
from melens.models.origin import fingerprint, origin_of
from melens.protocols import HookedModel, JsonObject, Loadable, bridged_config
from melens.provenance import ModelFacts, RunInfo
from melens.results import load_result
from melens.results.reach import Reach, ReachRow, ReachToken
from melens.results.scan import LayerCeiling, WeightScan, Why
from melens.scanning.choosing import SAMPLE, Vocabulary, choose
from melens.settings import require_seed
from melens.streaming.streamed import load_streamed, stream_of


@dataclass
class Farthest:
    """Reducer: each sequence's largest |x| at its first token, and the entry in one dimension."""

    watched: int | None = None
    values: list[Tensor] = field(default_factory=list)
    dims: list[Tensor] = field(default_factory=list)
    there: list[Tensor] = field(default_factory=list)

    def update(self, x: Float[Tensor, "batch 1 d_model"], batch: Batch) -> None:
        """Take in what one site gave for some sequences of one token."""
        first = x.detach()[:, 0].float().cpu()
        dims = first.abs().argmax(dim=-1)
        self.dims.append(dims)
        self.values.append(first.gather(-1, dims[:, None])[:, 0])
        if self.watched is not None:
            self.there.append(first[:, self.watched])

    def result(self) -> tuple[Tensor, Tensor]:
        """Signed values and their dimensions, one a sequence."""
        return torch.cat(self.values), torch.cat(self.dims)


def reach(
    model: Loadable,
    scan: WeightScan | str | Path | None = None,
    *,
    tokens: Sequence[int] | Tensor | None = None,
    sample: int | None = None,
    seed: int = 0,
    until: int | None = None,
) -> Reach:
    """How far first tokens go, and how much of the scan's ceilings they use.

    A token alone at position 0 goes the way it goes at the head of any text, since nothing after
    it reaches back. All tokens are one batch: every block is read once.

    Args:    model: a folder, a named model or a hub id, which is streamed from disk; or a bridge,
             streamed or whole.
             scan: a WeightScan of the same model, or its file; gives the ceilings, and where to
             stop.
             tokens: token ids; None = BOS, the chat template's first token, and a sample.
             sample: how many more to draw from the vocabulary; None = 16 where no tokens are
             given, else 0.
             seed: of that draw.
             until: the last layer to run; None = the scan's erase layer, or the last one.
    Raises:  PromptError: no token, or one that the vocabulary does not have.
             ResultError: a scan of another model, or a file that holds none.
             SiteError: no such layer. What ``load_streamed`` raises.
    """
    require_seed(seed)
    tokens = _check(tokens, sample)
    scan = _read_scan(scan)
    model = _bridge(model)
    files = _files_key(model)
    if scan is not None:
        _require_same(model, files, scan)
    until = _until(model, scan, until)
    if sample is None:
        sample = SAMPLE * (tokens is None)
    chosen, lacking = choose(_vocabulary(model), tokens, sample, seed)
    ceilings = {row.layer: row for row in scan.profile} if scan is not None else {}
    outputs, writes = _run(model, list(chosen), until, ceilings)
    values, dims = (torch.stack(part) for part in zip(*outputs, strict=True))
    settings: JsonObject = {
        "tokens": len(chosen),
        "until": until,
        "scan": scan is not None,
        "files": files,
        **lacking,
    }
    return Reach(
        n_layers=model.cfg.n_layers,
        until=until,
        tokens=tuple(_token(model, i, item, values, dims) for i, item in enumerate(chosen.items())),
        profile=tuple(
            _row(layer, list(chosen), outputs[layer], writes.get(layer), ceilings.get(layer))
            for layer in range(until + 1)
        ),
        run=_run_info(model, seed, settings),
    )


def _check(tokens: Sequence[int] | Tensor | None, sample: int | None) -> Sequence[int] | None:
    """Token ids as a sequence; before the model is touched."""
    if sample is not None and sample < 0:
        raise PromptError(f"sample must be 0 or more, got {sample}.")
    if isinstance(tokens, Tensor):
        tokens = tokens.flatten().tolist()
    if tokens is None:
        return None
    whole = isinstance(tokens, Sequence) and all(isinstance(token, int) for token in tokens)
    if not whole:
        raise PromptError(f"tokens must be a list of token ids, got {brief(tokens)}.")
    if not tokens and not sample:
        raise PromptError("there is no token to try; give token ids, or a sample.")
    if min(tokens, default=0) < 0:
        raise PromptError(f"token ids count from 0, got {min(tokens)}.")
    return tokens


def _read_scan(scan: object) -> WeightScan | None:
    """Before the model is touched."""
    found = load_result(scan) if isinstance(scan, (str, Path)) else scan
    if found is not None and not isinstance(found, WeightScan):
        raise ResultError(f"reach() needs what scan() gave, got {type(found).__name__}.")
    return found


def _bridge(model: Loadable) -> HookedModel:
    if isinstance(model, (str, Path)):
        return load_streamed(model, need_tokenizer=False)
    return adopt(model)


def _files_key(model: HookedModel) -> str | None:
    """What a scan of the same files calls them; None for a model that is in memory."""
    if (reading := stream_of(model)) is None:
        return None
    return reading.checkpoint.key()


def _require_same(model: HookedModel, files: str | None, scan: WeightScan) -> None:
    """A scan of other weights would give ceilings that are none of this model's."""
    of, name = scan.run.model, origin_of(model).name
    here = (model.cfg.n_layers, model.cfg.d_model)
    if here != (scan.n_layers, scan.d_model):
        raise ResultError(
            f"the scan is of another model: {of} has {scan.n_layers} layers of width "
            f"{scan.d_model}, {name} has {here[0]} of {here[1]}; scan this model."
        )
    key = scan.run.settings.get("files")
    if files is not None and scan.run.settings.get("format") == "safetensors" and key != files:
        raise ResultError(
            f"the scan is of other weight files ({of}) than those of {name}; scan this model."
        )


def _until(model: HookedModel, scan: WeightScan | None, until: int | None) -> int:
    n = model.cfg.n_layers
    wanted = until if until is not None or scan is None else scan.erase_layer
    if wanted is None:
        return n - 1
    if not 0 <= wanted < n:
        raise SiteError(f"layer {wanted} is outside 0..{n - 1}. Layers count from 0.")
    return wanted


def _vocabulary(model: HookedModel) -> Vocabulary:
    config = bridged_config(model)
    return Vocabulary(getattr(model, "tokenizer", None), config, model.cfg.d_vocab)


def _run(
    model: HookedModel, tokens: list[int], until: int, ceilings: dict[int, LayerCeiling]
) -> tuple[list[tuple[Tensor, Tensor]], dict[int, Farthest]]:
    """Per layer: the outputs' extremes, and the FFN's writes where there is an FFN."""
    blocks = anatomy(model).blocks[: until + 1]
    outputs = [Farthest() for _ in blocks]
    writes = {
        block.layer: Farthest(getattr(ceilings.get(block.layer), "dim", None))
        for block in blocks
        if block.ffn_write
    }
    taps = {resid_post(layer): tap for layer, tap in enumerate(outputs)}
    taps |= {str(blocks[layer].ffn_write): tap for layer, tap in writes.items()}
    stream(model, Batch.of(torch.tensor(tokens)[:, None]), taps)
    return [tap.result() for tap in outputs], writes


def _token(
    model: HookedModel, i: int, item: tuple[int, Why], values: Tensor, dims: Tensor
) -> ReachToken:
    token, why = item
    tokenizer = getattr(model, "tokenizer", None)
    at = int(values[:, i].abs().argmax())
    return ReachToken(
        token_id=token,
        token=tokenizer.decode([token]) if tokenizer is not None else f"<{token}>",
        why=why,
        value=values[at, i].item(),
        layer=at,
        dim=int(dims[at, i]),
        largest=tuple(values[:, i].abs().tolist()),
        dims=tuple(dims[:, i].tolist()),
    )


def _row(
    layer: int,
    tokens: list[int],
    output: tuple[Tensor, Tensor],
    write: Farthest | None,
    bound: LayerCeiling | None,
) -> ReachRow:
    values, dims = output
    top = int(values.abs().argmax())
    ceiling = getattr(bound, "ceiling", None)
    made: JsonObject = {"write": None, "write_dim": None, "write_token_id": None, "used": None}
    if write is not None:
        wrote, where = write.result()
        most = int(wrote.abs().argmax())
        made |= {"write": wrote[most].item(), "write_dim": int(where[most])}
        made |= {"write_token_id": tokens[most]}
        if ceiling and write.there:
            made["used"] = torch.cat(write.there).abs().max().item() / ceiling
    return ReachRow(
        layer=layer,
        value=values[top].item(),
        dim=int(dims[top]),
        token_id=tokens[top],
        ceiling=ceiling,
        ceiling_dim=getattr(bound, "dim", None),
        **made,
    )


def _run_info(model: HookedModel, seed: int, settings: JsonObject) -> RunInfo:
    origin, parameter = origin_of(model), next(model.parameters())
    facts = ModelFacts(
        origin.name,
        origin.revision,
        fingerprint(model),
        str(parameter.dtype).removeprefix("torch."),
        str(parameter.device),
    )
    return RunInfo.collect(facts, seed=seed, settings=settings)
