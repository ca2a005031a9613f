"""Token ids that somebody made: tensors, lists, and what a tokenizer gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from melens.errors import PromptError

Rows = list[list[int]]
MOST = 1 << 40
"""Ids are below it; no vocabulary is near."""
FITS = "give texts, token ids ([pos] or [batch, pos]), a tokenizer's output, or token batches"


def read_ids(source: object, *, pad_id: int | None = None) -> tuple[Rows, list[list[bool]]] | None:
    """Rows of ids with what is real in them; None where ``source`` is something else.

    A tensor or an array without a mask has padding where its rows end (or begin) with more
    ``pad_id`` than the row with the least of them: so a tokenizer pads.

    Args:    source: a tensor or an array ``[pos]`` or ``[batch, pos]``; a list of ids, or of such
             rows; a mapping with ``input_ids`` and perhaps ``attention_mask``.
             pad_id: what the tokenizer pads with, if it does.
    Raises:  PromptError: ids of another type or shape, or mixed with something else.
    """
    if isinstance(source, Mapping):
        return _of_mapping(source, pad_id)
    if _is_array(source):
        return _of_array(source, pad_id)
    if not isinstance(source, (list, tuple)) or not source:
        return None
    if all(map(_is_int, source)):
        return [_row(source)], [[True] * len(source)]
    if all(isinstance(row, (list, tuple)) or _is_array(row) for row in source):
        rows = [_row(row) for row in source]
        if len(set(map(len, rows))) == 1:
            return rows, _real(rows, pad_id)
        return rows, [[True] * len(row) for row in rows]
    if all(isinstance(item, Mapping) for item in source):
        made = [_of_mapping(item, pad_id) for item in source]
        return [row for rows, _ in made for row in rows], [row for _, real in made for row in real]
    if any(_is_int(item) or isinstance(item, (list, tuple, Mapping)) for item in source):
        kinds = ", ".join(sorted({type(item).__name__ for item in source}))
        raise PromptError(f"a list of {kinds} mixed is neither texts nor token ids; {FITS}.")
    return None


def padded(rows: Rows, real: list[list[bool]]) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[batch, pos]``; where rows differ in length they are padded on the right.

    Padding is id 0, whatever was there: it is in every vocabulary, and never looked at.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, here) in enumerate(zip(rows, real, strict=True)):
        mask[i, : len(row)] = torch.tensor(here)
        ids[i, : len(row)] = torch.tensor(row)
    return ids.masked_fill(~mask, 0), mask


def require_no_hole(mask: Tensor) -> None:
    """Refuse a mask ``[batch, pos]`` with padding between two tokens: a text has no holes.

    Raises:  PromptError: naming the row and the position.
    """
    real = mask.bool()
    again = real & ~real.roll(1, -1) & (real.cumsum(-1) > 1)
    if again.any():
        row, at = again.nonzero()[0].tolist()
        raise PromptError(
            f"the attention mask of row {row} has padding before position {at}, in the middle of "
            "the text; padding can only be to the left or to the right of it."
        )


def _of_mapping(source: Mapping[str, object], pad_id: int | None) -> tuple[Rows, list[list[bool]]]:
    if "input_ids" not in source:
        raise PromptError(f"a {type(source).__name__} without 'input_ids' is not a text; {FITS}.")
    if unread := [name for name in ("position_ids", "inputs_embeds") if name in source]:
        raise PromptError(f"{unread[0]} would not be used; melens counts positions itself.")
    found = read_ids(source["input_ids"], pad_id=pad_id)
    if found is None:
        raise PromptError("the 'input_ids' given hold no token ids.")
    rows, _ = found
    given = source.get("attention_mask")
    if given is None:
        return found
    made = read_ids(_numbers(given))
    if made is None or [len(row) for row in made[0]] != [len(row) for row in rows]:
        raise PromptError("attention_mask must have the shape of input_ids.")
    return rows, [[bool(value) for value in row] for row in made[0]]


def _numbers(mask: object) -> object:
    """A mask of truth values as one of 0 and 1."""
    if isinstance(mask, bool):
        return int(mask)
    if isinstance(mask, (list, tuple)):
        return [_numbers(part) for part in mask]
    if isinstance(mask, Tensor):
        return mask.long()
    kind = getattr(getattr(mask, "dtype", None), "kind", None)
    astype = getattr(mask, "astype", None)
    return astype(int) if kind == "b" and astype is not None else mask


def _of_array(source: Tensor, pad_id: int | None) -> tuple[Rows, list[list[bool]]]:
    shape = tuple(source.shape)
    if len(shape) not in (1, 2) or not all(shape):
        raise PromptError(f"token ids must be [pos] or [batch, pos] and not empty, got {shape}.")
    rows = [_row(row) for row in (source if len(shape) == 2 else [source])]
    return rows, _real(rows, pad_id)


def _real(rows: Rows, pad_id: int | None) -> list[list[bool]]:
    """What is no padding in rows of one length."""
    width = len(rows[0])
    after = [_leading(row[::-1], pad_id) for row in rows]
    before = [_leading(row, pad_id) for row in rows]
    right = [count - min(after) for count in after]
    left = [0 if any(right) else count - min(before) for count in before]
    return [
        [start <= i < width - end for i in range(width)]
        for start, end in zip(left, right, strict=True)
    ]


def _leading(row: Sequence[int], token: int | None) -> int:
    return next((i for i, here in enumerate(row) if here != token), len(row))


def _row(row: Any) -> list[int]:
    values = row.tolist() if _is_array(row) else list(row)
    if not isinstance(values, list) or not values or not all(map(_is_int, values)):
        said = str(values)[:60]
        raise PromptError(f"token ids must be rows of whole numbers, got {said}; {FITS}.")
    if not all(-MOST < int(value) < MOST for value in values):
        raise PromptError(f"token ids must be below {MOST}, got one far beyond any vocabulary.")
    return [int(value) for value in values]


def _is_int(value: object) -> bool:
    if isinstance(value, (bool, str, Tensor)):
        return False
    scalar = getattr(value, "ndim", 0) == 0
    return isinstance(value, int) or (scalar and hasattr(value, "__index__"))


def _is_array(value: object) -> TypeGuard[Tensor]:
    """A tensor or an array of numbers; an array of strings is a list of texts."""
    if isinstance(value, Tensor):
        return True
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return hasattr(value, "shape") and hasattr(value, "tolist") and kind in ("i", "u", "f", "b")
