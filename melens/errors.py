"""Every error a user can see; each carries the exit code of the command it ends."""

from __future__ import annotations

from melens.formatting import printable

BAD_INPUT = 2
"""Exit code: bad usage or bad input, refused before work starts."""
COULD_NOT_RUN = 3
"""Exit code: the model, the data, the network or the memory said no."""
INTERRUPTED = 130
"""Exit code: Ctrl-C, as shells have it."""


class MelensError(Exception):
    """Base of every error melens raises on purpose: one line, what was given and what to do."""

    exit_code: int = BAD_INPUT

    def __str__(self) -> str:
        """The message on one line, safe to show: what it quotes of a file may hold anything."""
        return printable(Exception.__str__(self))


class UnknownNameError(MelensError, KeyError):
    """A name that no registry knows."""


class DuplicateNameError(MelensError):
    """A name registered twice."""


class PromptError(MelensError):
    """Texts that cannot be turned into token batches."""


class ModelError(MelensError):
    """A model that cannot be loaded or analysed as it is."""


class ModelNotFoundError(ModelError):
    """No model of that name or path."""


class FetchError(ModelError):
    """Weights could not be fetched from the package index or the hub."""

    exit_code = COULD_NOT_RUN


class LicenceError(ModelError):
    """Weights whose licence was not accepted yet."""


class WeightsError(ModelError):
    """Weight files that are missing, truncated, corrupt, pickled or not finite."""


class ContractError(ModelError):
    """A loaded model whose hooks do not mean what melens needs them to mean."""

    exit_code = COULD_NOT_RUN


class FoldedWeightsError(ModelError):
    """Norm gains were folded into the next matrix, so they cannot be read."""


class SiteError(MelensError):
    """A layer, site or position that the model does not have."""


class CaptureError(MelensError):
    """A capture that saw nothing, or not what was asked for."""


class InterventionError(MelensError):
    """An edit that cannot be done as asked, or that never took place."""


class NoTokenError(InterventionError):
    """Passes ran under an edit, but none held a token that it was to change."""


class EditWarning(UserWarning):
    """An edit touched tokens that were not massive, or left massive ones out."""


class BusyError(MelensError):
    """A model that another thread has an edit or a capture open on."""

    exit_code = COULD_NOT_RUN


class MetricError(MelensError):
    """A metric that is undefined on what it was given."""


class ResultError(MelensError):
    """A saved result that cannot be read, or is of another kind."""


class SweepError(MelensError):
    """A sweep that cannot be understood, or whose machines cannot be had."""


class EngineError(SweepError):
    """Machines, a scheduler or a cluster that do not answer."""

    exit_code = COULD_NOT_RUN


class PolicyError(MelensError):
    """A policy that cannot be read, or that asks for what there is not."""


class OutputError(MelensError):
    """Results could not be written."""

    exit_code = COULD_NOT_RUN


class MissingPackageError(MelensError):
    """An extra's package, or data of one, that is not installed."""

    exit_code = COULD_NOT_RUN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's own allocator or the operating system had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in said or "not enough memory" in said or "can't allocate memory" in said
    )
