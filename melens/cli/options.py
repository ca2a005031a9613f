"""Options that several commands share, in groups: one meaning, one help text, declared once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from melens.cli import completing
from melens.cli.groups import without
from melens.errors import InterventionError, MelensError, ResultError
from melens.formatting import brief
from melens.network import go_offline
from melens.progress import hush
from melens.protocols import Options

if TYPE_CHECKING:
    from melens.results.edit import Edit

T = TypeVar("T")
Number = TypeVar("Number", int, float)
Model = Annotated[
    str,
    typer.Argument(
        help="A named model (see: melens models), a folder, a .gguf file or a Hugging Face id.",
        autocompletion=completing.models,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="Print the rule that decides, with its constants.")
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Force BOS on or off (default: as the tokenizer does)."),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=4, help="Tokens a sequence at most (default: 128, or the context if shorter)."
    ),
]
Located = Annotated[
    Path | None,
    typer.Option(
        help="This model's locate.json or a check's report.json; a scan.json only predicts, so "
        "the layer is located and both are said (default: locate first)."
    ),
]


@dataclass(frozen=True)
class TextOptions:
    """The texts that are measured on."""

    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 file to read instead of the bundled texts; - is stdin."),
    ] = None
    lines: Annotated[
        bool,
        typer.Option("--lines", help="Take every line of --text as a text (blank ones left out)."),
    ] = False
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text of your own; may be given several times.")
    ] = None
    bos: Bos = None
    chat: Annotated[bool, typer.Option("--chat", help="Put texts through the chat template.")] = (
        False
    )
    n_seq: Annotated[
        int | None, typer.Option(min=1, help="Sequences (default: 8, or one a prompt).")
    ] = None
    length: Length = None


@dataclass(frozen=True)
class OutputOptions:
    """Where a result goes."""

    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the JSON and the figures.")
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite results of a different evaluation in --out.")
    ] = False
    as_json: Json = False


Output = Annotated[OutputOptions, without("force")]
"""Of a command whose --out holds no evaluation."""


class Dtype(StrEnum):
    """Numbers the model computes in; statistics are float32 or better whatever this is."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


def seed_option(help: str) -> object:
    """A --seed that chooses something else than the tokens that are tried alone."""
    return typer.Option(min=0, max=2**63 - 1, help=help)


def _obey(switch: Callable[[], None]) -> Callable[[bool], bool]:
    """A callback that does what its flag says as soon as it is read."""

    def read(given: bool) -> bool:
        if given:
            switch()
        return given

    return read


@dataclass(frozen=True)
class RunOptions:
    """How the model is loaded and run."""

    device: Annotated[
        str, typer.Option(envvar="MELENS_DEVICE", help="auto, cpu, cuda, mps, ...")
    ] = "auto"
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            envvar="MELENS_DTYPE",
            help="Default: float32 on the CPU, else the checkpoint's own.",
        ),
    ] = None
    batch_size: Annotated[
        int, typer.Option(min=1, envvar="MELENS_BATCH_SIZE", help="Sequences a forward pass.")
    ] = 4
    seed: Annotated[int, seed_option("Chooses the tokens that are tried alone.")] = 0
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model repository's own code.")
    ] = False
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map",
            help="For a model that fits on no one device: auto, balanced or sequential over GPUs, "
            "memory and disk; see docs/scale.md.",
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            help="With --device-map: what each device may hold, e.g. 0=20GB,cpu=4GB. The rest is "
            "read from disk in every pass.",
        ),
    ] = None
    offload_folder: Annotated[
        Path | None,
        typer.Option(
            "--offload-folder", help="With --device-map: folder for weights that go to disk."
        ),
    ] = None
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            callback=_obey(go_offline),
            help="Never use the network; so does MELENS_OFFLINE=1.",
        ),
    ] = False
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=_obey(hush),
            help="Print the summary line alone: no tables, progress or notes, only errors and what "
            "an edit missed. --json is as ever.",
        ),
    ] = False

    def loading(self) -> Options:
        """What the functions that load a model are told; refuses what does not fit together."""
        return {
            **self._placed(),
            "device": None if self.device == "auto" else self.device,
            "dtype": self.dtype.value if self.dtype else None,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }

    def _placed(self) -> Options:
        if not (self.device_map or self.max_memory or self.offload_folder):
            return {}
        from melens.placement import memory_limits, placement_options

        device = None if self.device == "auto" else self.device
        limits = memory_limits(self.max_memory)
        return placement_options(self.device_map, limits, self.offload_folder, device=device)


PLACED = ("device_map", "max_memory", "offload_folder")
"""Options of :class:`RunOptions` for models on several devices."""
SeededRun = Annotated[RunOptions, without("batch_size")]
"""Of a command that runs one sequence, or one item, at a time."""


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


@dataclass(frozen=True)
class EditOptions:
    """An edit of the model: its name and the mask's settings, or the file that says them."""

    edit: Annotated[
        EditKind | None,
        typer.Option(
            "--edit",
            help="none; wemask: the mask; zero, mean: the massive coordinates after the ME Layer; "
            "norm-flatten, ffn-cap: at the ME Layer; drop-key: the sink token's key and value. "
            "Default: wemask, or what MODEL's melens.json says.",
        ),
    ] = None
    mask_select: Annotated[
        SelectKind | None,
        typer.Option(
            "--mask-select",
            help="Dimensions by largest norm gain (gamma), |activation|, their product, at random, "
            "or as controls by smallest |activation| (bottom) or gain (bottom-gamma). Default: "
            "gamma.",
        ),
    ] = None
    mask_rate: Annotated[
        float | None,
        typer.Option(
            "--mask-rate",
            min=0,
            max=1,
            help="Share of the dimensions that is masked. Default: 0.5.",
        ),
    ] = None
    mask_strength: Annotated[
        float | None,
        typer.Option(
            "--mask-strength", min=0, max=1, help="0 = no change, 1 = the whole edit. Default: 1."
        ),
    ] = None
    mask_layers: Annotated[
        str | None,
        typer.Option(
            "--mask-layers",
            help="after = all after the ME Layer, next = the first of them, or layers from 0: "
            "12-29,31. Default: after.",
        ),
    ] = None
    mask_seed: Annotated[
        int | None,
        typer.Option(
            "--mask-seed", min=0, max=2**63 - 1, help="For --mask-select random. Default: 0."
        ),
    ] = None
    edit_file: Annotated[
        Path | None,
        typer.Option(
            "--edit-file",
            help="A JSON file with an edit, instead of these options: the edit.json of melens "
            "tune, a melens.json, an evaluate.json.",
        ),
    ] = None


SETTINGS = ("select", "rate", "strength", "layers", "seed")
RUN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def edit_of(options: EditOptions, model: str | Path | None = None) -> Edit:
    """The edit that these options mean; torch is not loaded.

    Args:    model: MODEL as typed; where it is a folder with a melens.json and none of these
             options was given, the edit is that file's.
    Raises:  InterventionError: settings that the named edit does not have, or layers that are
             none. ResultError: a melens.json that cannot be read.
    """
    from pydantic import ValidationError

    from melens.results.edit import Edit

    given = {key: getattr(options, f"mask_{key}") for key in SETTINGS}
    given = {key: value for key, value in given.items() if value is not None}
    if options.edit_file is not None:
        if options.edit is not None or given:
            raise InterventionError("--edit-file says it all; drop --edit and --mask-*.")
        return read_edit_file(options.edit_file)
    if options.edit is None and not given and (saved := edit_beside(model)) is not None:
        return saved
    if "layers" in given:
        given["layers"] = layers_from(given["layers"])
    name = options.edit or EditKind.wemask
    plain = {key: getattr(value, "value", value) for key, value in given.items()}
    try:
        return Edit.model_validate({"name": name.value, **plain})
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"--mask-{part}: " for part in first["loc"][:1])
        raise InterventionError(f"{place}{first['msg'].removeprefix('Value error, ')}.") from None


def edit_beside(model: str | Path | None) -> Edit | None:
    """The edit in a model folder's melens.json; None where there is no such file.

    Raises:  ResultError: it cannot be read.
    """
    from melens.results.edit import MELENS_JSON

    path = None if model is None else Path(model).expanduser() / MELENS_JSON
    return read_edit_file(path) if path is not None and path.is_file() else None


def has_edit(model: str | Path) -> bool:
    """Whether a melens.json beside a model's weights names an edit, or cannot be read."""
    try:
        found = edit_beside(model)
    except ResultError:
        return True
    return found is not None and found.name != "none"


def read_edit_file(path: Path) -> Edit:
    """The edit that a JSON file names under "edit".

    Raises:  ResultError: no such file, or no edit in it.
    """
    from pydantic import ValidationError

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


def values_from(
    option: str, text: str, read: Callable[[str], T], fits: str, error: type[MelensError]
) -> tuple[T, ...]:
    """The values between commas, in the order they were typed.

    Raises:  ``error``: what ``read`` makes no value of.
    """
    try:
        return tuple(read(part.strip()) for part in text.split(","))
    except ValueError:
        raise error(f"{option} takes {fits}; got {brief(text)}.") from None


def numbers_from(
    option: str,
    text: str,
    kind: Callable[[str], Number],
    fits: str,
    error: type[MelensError],
    *,
    or_none: bool = False,
) -> tuple[Number, ...]:
    """The numbers between commas, each once, smallest first; where ``or_none``, ``none`` is none.

    Raises:  ``error``: what is no such number.
    """
    if or_none and text == "none":
        return ()
    wanted = f"{fits}, or none" if or_none else fits
    return tuple(sorted(set(values_from(option, text, kind, wanted, error))))
