"""``melens``: lm-eval's model class for a transformers model under an edit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from melens.batches import Batch
from melens.chat import chat_opening, render
from melens.errors import InterventionError, MissingPackageError
from melens.evaluating.edits import applied
from melens.evaluating.harness.settings import (
    PLAIN,
    ModelArguments,
    keep_apart,
    model_key,
    read_settings,
)
from melens.framing import prompt_ids
from melens.inputs import Inputs
from melens.measuring.located import check_same_model
from melens.protocols import AnyModel, HookedModel, JsonObject, Tokenizer, TransformersModel
from melens.results import MELayer

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models import huggingface
except ImportError as _error:
    raise MissingPackageError(
        f"evaluation with lm-eval needs it ({_error}); run: pip install 'melens[eval]'"
    ) from None

if TYPE_CHECKING:
    from lm_eval.api.model import CacheHook

HFLM: Any = huggingface.HFLM  # its registering decorator hides its type


class Generator(HFLM):
    """lm-eval's HFLM of a loaded model, with the tokenizer left as it was.

    Prompts are open at their end: a tokenizer's EOS would be in front of the answer.
    """

    def __init__(self, model: TransformersModel, tokenizer: Tokenizer, **passed_on: object) -> None:
        """``passed_on`` goes to HFLM verbatim."""
        own = _with_padding(tokenizer, model)
        super().__init__(pretrained=model, tokenizer=own, **passed_on)
        self._shown = False
        self.chat: bool | None = None
        """Whether prompts are texts of the chat template; None = those that begin as it does."""

    @cached_property
    def _opening(self) -> str:
        return chat_opening(self.tokenizer)

    def _from_template(self, text: str) -> bool:
        """Whether a text is one of the template, which alone says how it begins.

        Told by the text itself: lm-eval keeps requests, and one model serves tasks of both kinds.
        """
        if self.chat is not None:
            return self.chat
        return bool(self._opening) and text.startswith(self._opening)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: object,
    ) -> list[int]:
        """Token ids of a prompt; what the tokenizer puts in front is there once, and not before a
        text of the chat template.
        """  # noqa: D205
        asked = self.add_bos_token if add_special_tokens is None else add_special_tokens
        add = not self._from_template(string) if asked is None else asked
        ids = prompt_ids(self.tokenizer, string, add=add)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as :meth:`tok_encode` gives them, padded with an id that the model has."""
        rows = [self.tok_encode(string) for string in strings]
        if left_truncate_len:
            rows = [row[-left_truncate_len:] for row in rows]
        batch = Batch.pad(rows, side=padding_side)
        return batch.ids, batch.mask.long()

    def tok_decode(
        self, tokens: object, skip_special_tokens: bool = True
    ) -> str | list[str] | None:
        """Text of ids; None of the end token that a tokenizer lacks."""
        if tokens is None:
            return None
        return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """lm-eval's own, once the template has shown in a process of its own that it works.

        Raises:  PromptError: it does not.
        """
        if not self._shown:
            render(self.tokenizer, [chat_history], begin_answer=add_generation_prompt)
            self._shown = True
        return super().apply_chat_template(chat_history, add_generation_prompt)


@register_model("melens")
class MelensLM(Generator):
    """A model under one edit, for all of lm-eval's tasks.

    The edit is entered here and stays until :meth:`close`.
    """

    def __init__(self, pretrained: str, **settings: object) -> None:
        """Load it, locate its ME Layer where the edit needs one, and enter the edit.

        Args:    pretrained: a named model, a folder, a ``.gguf`` file or a hub id.
                 settings: see ``read_settings``; all of them are checked before anything loads.
        Raises:  MelensError: settings, model or edit, in one line.
        """
        wanted = read_settings(settings)
        edited, hf, tokenizer, me_layer = _loaded(str(pretrained), wanted)
        super().__init__(hf, tokenizer, **wanted.passed_on)
        self.edit, self.me_layer = wanted.edit, me_layer
        self.key = model_key(hf, tokenizer, wanted.edit, me_layer)
        """Tells this model under this edit from every other."""
        self._passes = 0
        self._open = ExitStack()
        self._open.enter_context(applied(edited, wanted.edit, me_layer))

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep this model's answers apart in the file that lm-eval caches answers in."""
        if cache_hook.dbdict is not None:
            keep_apart(cache_hook.dbdict, self.key)
        super().set_cache_hook(cache_hook)

    def close(self) -> None:
        """Leave the edit; the model is as it was.

        Raises:  InterventionError: the model was run, but never on a token that was to be edited.
        """
        try:
            self._open.close()
        except InterventionError:
            if self._passes:  # else every answer came from the cache
                raise

    def __del__(self) -> None:
        if "_open" in vars(self):
            with suppress(InterventionError):
                self._open.close()

    def _model_call(self, *args: object, **kwargs: object) -> object:
        self._passes += 1
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: object, **kwargs: object) -> object:
        self._passes += 1
        return super()._model_generate(*args, **kwargs)


def _with_padding(tokenizer: Tokenizer, model: Any) -> Tokenizer:
    """The tokenizer, or a copy that pads with an id which the model has."""
    size = model.get_input_embeddings().weight.shape[0]

    def fits(token: object) -> TypeGuard[int]:
        return isinstance(token, int) and 0 <= token < size

    if fits(tokenizer.pad_token_id):
        return tokenizer
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = (
        tokenizer.eos_token_id,
        *(ends if isinstance(ends, list) else [ends]),
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        0,
    )
    made = copy.deepcopy(tokenizer)
    made.pad_token_id = next(token for token in known if fits(token))
    return made


def _on_this_machine(loading: JsonObject) -> JsonObject:
    """lm-eval hands over cuda:0 where no device was asked for, GPU or not."""
    absent = str(loading.get("device", "")).startswith("cuda") and not torch.cuda.is_available()
    return {name: value for name, value in loading.items() if not (absent and name == "device")}


def _loaded(
    name: str, wanted: ModelArguments
) -> tuple[AnyModel, TransformersModel, Tokenizer, MELayer | None]:
    """What is edited, the transformers model in it, its tokenizer, and the ME Layer."""
    from melens.locating import locate
    from melens.models.loading import load, load_plain

    me_layer = wanted.me_layer
    wanted = replace(wanted, loading=_on_this_machine(wanted.loading))
    if wanted.edit.name not in PLAIN:
        bridge = load(name, **wanted.loading)
        me_layer = _of_these(bridge, me_layer) or locate(bridge)
        return bridge, bridge.original_model, bridge.tokenizer, me_layer
    if wanted.locate:
        # Locating bridges a model for good; the one that is evaluated stays plain.
        me_layer = locate(load(name, **wanted.loading))
    elif me_layer is not None:
        _of_these(load(name, **wanted.loading), me_layer)
    hf, tokenizer, _ = load_plain(name, **wanted.loading)
    return hf, hf, tokenizer, me_layer


def _of_these(bridge: HookedModel, me_layer: MELayer | None) -> MELayer | None:
    """A ME Layer that was read, refused where it is of other weights."""
    if me_layer is not None:
        check_same_model(Inputs.of(bridge), me_layer)
    return me_layer
