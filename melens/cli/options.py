"""Options that several commands share: one meaning, one help text; and the Edit that they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melens.formatting import brief
from melens.progress import hush

if TYPE_CHECKING:
    from melens.results.edit import Edit


class Dtype(StrEnum):
    """Numbers the model computes in; statistics are float32 or better whatever this is."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


Model = Annotated[
    str,
    typer.Argument(
        help="A named model (see: melens models), a folder, a .gguf file or a Hugging Face id."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Text = Annotated[
    Path | None,
    typer.Option(help="A UTF-8 file to read instead of the bundled texts; - is stdin."),
]
Lines = Annotated[
    bool, typer.Option("--lines", help="Take every line of --text as a text (blank ones left out).")
]
Prompt = Annotated[
    list[str] | None, typer.Option(help="A text of your own; may be given several times.")
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Force BOS on or off (default: as the tokenizer does)."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put texts through the chat template.")]
NSeq = Annotated[int | None, typer.Option(min=1, help="Sequences (default: 8, or one a prompt).")]
Length = Annotated[
    int | None,
    typer.Option(
        min=4, help="Tokens a sequence at most (default: 128, or the context if shorter)."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for the JSON and the figures.")
]
Device = Annotated[str, typer.Option(envvar="MELENS_DEVICE", help="auto, cpu, cuda, mps, ...")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        envvar="MELENS_DTYPE",
        help="Default: float32 on the CPU, else the checkpoint's own.",
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, envvar="MELENS_BATCH_SIZE", help="Sequences a forward pass.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Chooses the tokens that are tried alone.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model repository's own code.")
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Never use the network; so does MELENS_OFFLINE=1.")
]


def _hush(value: bool) -> bool:
    if value:
        hush()
    return value


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_hush,
        help="No progress and no notes on stderr, only errors and what an edit missed.",
    ),
]
Located = Annotated[
    Path | None,
    typer.Option(
        help="This model's locate.json, or a check's report.json (default: locate first)."
    ),
]


class EditKind(StrEnum):
    """Names of edits, as in ``melens.results.edit.EditName``."""

    none = "none"
    wemask = "wemask"
    zero = "zero"
    mean = "mean"
    norm_flatten = "norm-flatten"
    ffn_cap = "ffn-cap"
    drop_key = "drop-key"


class SelectKind(StrEnum):
    """A mask's rule for its dimensions, as in ``melens.results.edit.Select``."""

    gamma = "gamma"
    activation = "activation"
    product = "product"
    random = "random"
    bottom = "bottom"
    bottom_gamma = "bottom-gamma"


EditOption = Annotated[
    EditKind | None,
    typer.Option(
        "--edit",
        help="none; wemask: the mask; zero, mean: the massive coordinates after the ME Layer; "
        "norm-flatten, ffn-cap: at the ME Layer; drop-key: the sink token's key and value. "
        "Default: wemask, or what MODEL's melens.json says.",
    ),
]
MaskSelect = Annotated[
    SelectKind | None,
    typer.Option(
        "--mask-select",
        help="Dimensions by largest norm gain (gamma), |activation|, their product, at random, or "
        "as controls by smallest |activation| (bottom) or gain (bottom-gamma). Default: gamma.",
    ),
]
MaskRate = Annotated[
    float | None,
    typer.Option(
        "--mask-rate", min=0, max=1, help="Share of the dimensions that is masked. Default: 0.5."
    ),
]
MaskStrength = Annotated[
    float | None,
    typer.Option(
        "--mask-strength", min=0, max=1, help="0 = no change, 1 = the whole edit. Default: 1."
    ),
]
MaskLayers = Annotated[
    str | None,
    typer.Option(
        "--mask-layers",
        help="after = all after the ME Layer, next = the first of them, or layers from 0: "
        "12-29,31. Default: after.",
    ),
]
MaskSeed = Annotated[
    int | None,
    typer.Option("--mask-seed", min=0, max=2**63 - 1, help="For --mask-select random. Default: 0."),
]
EditFileOption = Annotated[
    Path | None,
    typer.Option(
        "--edit-file",
        help="A JSON file with an edit, instead of these options: the edit.json of melens tune, a "
        "melens.json, an evaluate.json.",
    ),
]
SETTINGS = ("select", "rate", "strength", "layers", "seed")
MELENS_JSON = "melens.json"
RUN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def edit_of(options: Mapping[str, Any], model: str | Path | None = None) -> Edit:
    """The edit that a command's ``edit`` and ``mask_*`` arguments mean; torch is not loaded.

    Args:    options: the command's arguments by name (``locals()``); others are ignored.
             model: MODEL as typed; where it is a folder with a melens.json and none of these
             options was given, the edit is that file's.
    Raises:  InterventionError: settings that the named edit does not have, or layers that are
             none. ResultError: a melens.json that cannot be read.
    """
    from pydantic import ValidationError

    from melens.errors import InterventionError
    from melens.results.edit import Edit

    name = options.get("edit")
    given = {key: options.get(f"mask_{key}") for key in SETTINGS}
    given = {key: value for key, value in given.items() if value is not None}
    if (file := options.get("edit_file")) is not None:
        if name is not None or given:
            raise InterventionError("--edit-file says it all; drop --edit and --mask-*.")
        return read_edit_file(Path(file))
    if name is None and not given and (saved := edit_beside(model)) is not None:
        return saved
    if "layers" in given:
        given["layers"] = layers_from(given["layers"])
    plain = {key: getattr(value, "value", value) for key, value in given.items()}
    try:
        return Edit.model_validate({"name": str(getattr(name, "value", name) or "wemask"), **plain})
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"--mask-{part}: " for part in first["loc"][:1])
        raise InterventionError(f"{place}{first['msg'].removeprefix('Value error, ')}.") from None


def edit_beside(model: str | Path | None) -> Edit | None:
    """The edit in a model folder's melens.json; None where there is no such file.

    Raises:  ResultError: it cannot be read.
    """
    path = None if model is None else Path(model).expanduser() / MELENS_JSON
    return read_edit_file(path) if path is not None and path.is_file() else None


def read_edit_file(path: Path) -> Edit:
    """The edit that a JSON file names under "edit".

    Raises:  ResultError: no such file, or no edit in it.
    """
    from pydantic import ValidationError

    from melens.errors import ResultError
    from melens.results.edit import Edit
    from melens.store import RESULT, read_text

    text = read_text(path, RESULT, error=ResultError)
    try:
        return Edit.model_validate(json.loads(text)["edit"])
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        raise ResultError(f"{path} holds no edit that melens can read.") from None


def layers_from(text: str) -> str | tuple[int, ...]:
    """``after``, ``next``, or the numbers of ``12-29,31``, in order and each once.

    Raises:  InterventionError: anything else.
    """
    from melens.errors import InterventionError

    if text in ("after", "next"):
        return text
    found: set[int] = set()
    for part in text.split(","):
        match = RUN.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first > 10_000:
            raise InterventionError(
                f"--mask-layers takes after, next, or layers from 0 such as 12-29,31; got "
                f"{brief(text)}."
            )
        found |= set(range(first, last + 1))
    return tuple(sorted(found))
