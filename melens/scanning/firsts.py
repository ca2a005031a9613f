"""A few first tokens, run through the blocks up to where the ceilings stand out.

The second half of a scan's verdict: a ceiling says what can be written, a run what is. The model
is transformers' own, a block in memory at a time; no bridge is made.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.capture import EverythingSeen, evaluating
from melens.errors import MelensError, ModelError
from melens.models.checkpoint import Checkpoint, read_folder
from melens.models.complaints import has_tokenizer
from melens.models.contract import failing
from melens.models.decoder import layer_list
from melens.models.loading import read_tokenizer
from melens.models.multimodal import language_config
from melens.models.weight_files import read_json, weight_files
from melens.protocols import Args, Tokenizer
from melens.results.scan import Allowed, TokensTried, TriedToken, Why
from melens.scanning.choosing import SAMPLE, Vocabulary, choose
from melens.streaming.skeleton import build_skeleton
from melens.streaming.streamed import folder_of, reading

CHEAP = 8e9
"""Bytes of weight files up to which first tokens are run unasked: 4 billion parameters in bf16."""
FAR = 100.0
"""Times the needed size. A prediction that no first token reaches stays only if one neuron could
write this much. Of both real models one can: of SmolLM2 507 times, of Gemma 274 times."""


@dataclass(frozen=True)
class Spot:
    """What is looked at: the predicted coordinates at the layers of the stage."""

    allowed: Allowed
    dims: tuple[int, ...]

    @property
    def layers(self) -> range:
        """From the predicted layer to the last in which a neuron stands out."""
        last = self.allowed.last_layer
        return range(self.allowed.layer, (self.allowed.highest_layer if last is None else last) + 1)


def look(
    files: Checkpoint, model: str | Path, spot: Spot, *, device: str, wanted: bool | None
) -> tuple[TokensTried | None, str | None]:
    """Run first tokens where that can be done.

    Args:    files: open; of the model. wanted: None = where it costs little, True = it must be.
    Returns: what they reach, or None and why none were run.
    Raises:  MelensError: ``wanted`` is True and the model cannot be run a block at a time.
    """
    try:
        folder = _folder(files, model, wanted=wanted)
        if files.kind == "gguf":  # read as it is by the scan; what runs is its converted copy
            config = language_config(read_json(folder / "config.json"))
            files = read_folder(weight_files(folder, config), config)
        return first_tokens(files, folder, spot, device=device), None
    except MelensError as error:
        if wanted:
            raise
        return None, f"first tokens were not tried: {str(error).rstrip('.')}"


def _folder(files: Checkpoint, model: str | Path, *, wanted: bool | None) -> Path:
    """Where the model's safetensors are on this machine.

    Raises:  ModelError: they are not here, or a run that nobody asked for would cost much.
    """
    if files.kind == "gguf":
        if not wanted:
            raise ModelError("a GGUF has to be converted before it is run, which --reach does")
        return folder_of(str(model), None)[0]
    paths = [blob.path for blob in files.blobs]
    here = [path for path in paths if isinstance(path, Path)]
    if len(here) < len(paths):
        raise ModelError(
            f"the weight files of {files.name} are not all on this machine; fetch the model first"
        )
    size = sum(blob.size for blob in files.blobs)
    if size > CHEAP and not wanted:
        raise ModelError(
            f"the files hold {size / 1e9:.0f} GB, and more than {CHEAP / 1e9:.0f} are read only "
            "when asked for (--reach)"
        )
    return here[0].parent


def first_tokens(files: Checkpoint, folder: Path, spot: Spot, *, device: str) -> TokensTried:
    """BOS, a chat's first token and a sample of the vocabulary, each alone at position 0.

    Without a tokenizer BOS is the config's, and any token of the vocabulary may be drawn.

    Raises:  ModelError: the model cannot be built, or a block leaves something else than a residual
             stream. WeightsError: missing, misshapen or NaN.
    """
    skeleton = build_skeleton(folder, files, dtype=torch.float32, device=device)
    skeleton.model.to(device)
    tokenizer = _tokenizer(folder)
    words = Vocabulary(tokenizer, skeleton.model.config, skeleton.embedding.placeholder.shape[0])
    chosen, _ = choose(words, None, SAMPLE, 0)
    ids = torch.tensor(list(chosen), device=device)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Args, out: Tensor | tuple[object, ...]) -> None:
        first = out if isinstance(out, Tensor) else out[0]
        if not isinstance(first, Tensor) or first.shape[:2] != (len(ids), 1) or first.ndim != 3:
            raise ModelError("what a block leaves is no residual stream")
        outputs.append(first[:, 0].float().cpu())
        if len(outputs) == len(spot.layers):
            raise EverythingSeen

    model = skeleton.model
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(reading(skeleton, files, ids))
        stack.enter_context(failing(f"{type(model).__name__} cannot run block by block"))
        stack.enter_context(evaluating(model))
        for layer, block in enumerate(layer_list(model)):
            if layer in spot.layers:
                stack.callback(block.register_forward_hook(keep).remove)
        with suppress(EverythingSeen):
            model(ids[:, None], use_cache=False)
    if len(outputs) != len(spot.layers):
        raise ModelError("its blocks do not run once each, one after another")
    return seen(torch.stack(outputs), spot, chosen, tokenizer)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """None where there is none that can be read: the run needs none."""
    if not has_tokenizer(folder):
        return None
    with suppress(ModelError):
        return read_tokenizer(folder, {"local_files_only": True, "trust_remote_code": False})
    return None


def seen(
    x: Float[Tensor, "layer token d_model"],
    spot: Spot,
    chosen: dict[int, Why],
    tokenizer: Tokenizer | None = None,
) -> TokensTried:
    """How far each token gets in the predicted coordinates.

    Args:    x: block outputs of ``spot.layers``, one token a row, in the order of ``chosen``.
    """
    needed = spot.allowed.needed
    tokens = []
    for i, (token, why) in enumerate(chosen.items()):
        path = x[:, i]
        there = path[:, list(spot.dims)]
        at, k = divmod(int(there.abs().argmax()), len(spot.dims))
        value, median = there[at, k].item(), path[at].abs().median().item()
        tokens.append(
            TriedToken(
                token_id=token,
                token=f"<{token}>" if tokenizer is None else tokenizer.decode([token]),
                why=why,
                value=value,
                dim=spot.dims[k],
                layer=spot.layers[at],
                times=abs(value) / median if median else None,
                largest=path.abs().max().item(),
            )
        )
    return TokensTried(
        layer=spot.layers[0],
        until=spot.layers[-1],
        needed=needed,
        reached=sum(abs(token.value) > needed for token in tokens),
        tokens=tuple(tokens),
    )
