"""Names in a checkpoint that was saved from inside a wrapper, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterable

WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod.save_pretrained(folder)"),
    "module.": ("data parallelism", "model.module.save_pretrained(folder)"),
    "_fsdp_wrapped_module.": ("FSDP", "the full state dict"),
    "base_model.model.": ("PEFT", "model.merge_and_unload().save_pretrained(folder)"),
}


def what_to_do(names: Iterable[str]) -> str:
    """For a checkpoint that lacks a tensor: strip the wrapper's prefix, or fetch it again."""
    known = list(names)
    for prefix, (maker, instead) in WRAPPERS.items():
        if known and sum(name.startswith(prefix) for name in known) > len(known) / 2:
            return (
                f"its names begin with '{prefix}', as a model saved inside {maker} has them: save "
                f"what is inside ({instead}), or strip that prefix from the names in the files."
            )
    return "fetch it again."
