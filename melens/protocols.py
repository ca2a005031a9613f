"""What melens uses of other libraries' objects: hooked models, tokenizers, what JSON holds.

Neither torch nor TransformerLens is imported at run time. The protocols are for the type checker:
whether an object is a model that fits is measured (``models/contract.py``), never read off its
attributes, and the suite's run-time checks see ``object``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

JsonObject = dict[str, Any]
"""A JSON object as the standard library reads and writes it: what its values are is for who parses
it to say. Also one row of a table."""

Options = dict[str, Any]
"""Arguments by name, for a function that says itself what it takes."""
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
"""What a torch module is called with, as its hooks see it: every module has its own."""
Called = tuple[Args, Kwargs] | None
"""What a torch pre-hook gives back: other arguments; None = as they were."""

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import Protocol

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle
    from transformer_lens.hook_points import HookPoint
    from transformers import DynamicCache as KeyValueCache
    from transformers import PretrainedConfig as PretrainedConfig
    from transformers import PreTrainedModel

    Json = Mapping[str, "Json"] | Sequence["Json"] | str | int | float | bool | None
    """A value that JSON can hold."""

    Encoding = Mapping[str, Any]
    """What a tokenizer makes of a text: ``input_ids``, and what else was asked for."""

    class Tokenizer(Protocol):
        """A transformers tokenizer, slow or fast."""

        bos_token_id: int | None
        eos_token_id: int | None
        pad_token_id: int | None
        unk_token_id: int | None

        def __call__(self, text: str, **options: object) -> Encoding: ...
        def decode(self, token_ids: Sequence[int], /, **options: object) -> str: ...
        def __len__(self) -> int: ...
        def get_vocab(self) -> dict[str, int]: ...
        def apply_chat_template(self, conversation: object, /, **options: object) -> object: ...
        def save_pretrained(self, save_directory: str | Path, /) -> object: ...

    class TransformersModel(PreTrainedModel):
        """A causal language model as transformers makes it."""

        generate: Callable[..., Tensor]
        # functools.wraps there hides from pyright that it is a method
        to: Callable[..., TransformersModel]  # pyright: ignore[reportIncompatibleVariableOverride]

    class ModelConfig(Protocol):
        """Sizes of a hooked model; whatever else its config may hold is asked for with getattr."""

        n_layers: int
        n_heads: int
        d_model: int
        d_head: int
        d_vocab: int
        n_ctx: int
        architecture: str | None
        tokenizer_prepends_bos: bool | None

    class HookedModel(Protocol):
        """A TransformerBridge, or a HookedTransformer of TransformerLens 3.9.

        ``tokenizer`` is None where there is none, which whoever needs one refuses first. Only a
        bridge has ``original_model``: ask with hasattr.
        """

        cfg: ModelConfig
        tokenizer: Tokenizer
        original_model: TransformersModel
        forward: Callable[..., object]

        @property
        def hook_dict(self) -> Mapping[str, HookPoint]: ...
        @property
        def blocks(self) -> nn.ModuleList: ...
        @property
        def ln_final(self) -> nn.Module: ...
        @property
        def unembed(self) -> nn.Module: ...
        def __call__(self, ids: Tensor, /, **options: object) -> Tensor: ...
        def hooks(
            self, fwd_hooks: list[tuple[str, Callable[..., object]]]
        ) -> AbstractContextManager[object]: ...
        def modules(self) -> Iterator[nn.Module]: ...
        def parameters(self) -> Iterator[nn.Parameter]: ...
        def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
        def state_dict(self) -> Mapping[str, Tensor]: ...
        def eval(self) -> HookedModel: ...
        def register_forward_hook(
            self, hook: Callable[..., object], /, *, always_call: bool = False
        ) -> RemovableHandle: ...
        def register_forward_pre_hook(
            self,
            hook: Callable[..., object],
            /,
            *,
            prepend: bool = False,
            with_kwargs: bool = False,
        ) -> RemovableHandle: ...

    AnyModel = HookedModel | nn.Module
    """A model object: hooked, or as transformers makes it (or PEFT around one)."""

    class Prepared(Protocol):
        """What ``melens.inputs.prepare`` gives: a model that was looked at, and its texts."""

        @property
        def model(self) -> HookedModel: ...
        @property
        def weights(self) -> str: ...

    Loadable = str | Path | AnyModel
    """What melens.load takes: a name, a folder, a file, a hub id, or a model object."""
    ModelLike = Loadable | Prepared
    """What a measurement takes: the same, or what was prepared already."""
else:
    Json = Encoding = Tokenizer = ModelConfig = HookedModel = object
    AnyModel = Loadable = ModelLike = Prepared = TransformersModel = object
    KeyValueCache = PretrainedConfig = object


def is_hooked(model: object) -> TypeGuard[HookedModel]:
    """Whether a model has TransformerLens hooks."""
    return hasattr(model, "hook_dict")


def transformers_of(model: object) -> TransformersModel:
    """The transformers module inside a bridge; any other model is itself."""
    return cast("TransformersModel", getattr(model, "original_model", model))


def bridged_config(model: object) -> PretrainedConfig | None:
    """The config of the transformers module inside a bridge; None where there is none."""
    return getattr(getattr(model, "original_model", None), "config", None)
