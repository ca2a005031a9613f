"""An edit that is kept open on a model, rather than for the length of a ``with``."""

from __future__ import annotations

from typing import Any

from melens.capture import EachPass, enter_kept, exit_kept
from melens.evaluating.edits import applied
from melens.interventions.core import warn_of
from melens.interventions.edited import EditedTokens
from melens.results import MELayer
from melens.results.edit import Edit


class _ClosedError(Exception):
    """Leaves an edit's context without the check that it was of use."""


class OpenEdit:
    """An edit in force until it is closed; one that no forward pass used is no error here.

    The model is no thread's own meanwhile: whoever runs it has it for the length of the pass.
    """

    def __init__(self, model: Any, edit: Edit, me_layer: MELayer | None) -> None:
        self.edit, self.me_layer = edit, me_layer
        self._model, self._context = model, applied(model, edit, me_layer)
        self.record, self._count = enter_kept(model, self._context)
        """A mask's MaskRecord, other edits' EditedTokens; None where nothing is edited."""
        self._passes = EachPass(model)

    @property
    def active(self) -> bool:
        """Whether it is still in force."""
        return self._context is not None

    def close(self) -> None:
        """Take the edit off; the model is as it was. A second call does nothing.

        Warns as an edit does at the end of its ``with``.
        """
        if self._context is None:
            return
        exit_kept(self._model, self._context, self._count, _ClosedError())
        self._passes.close()
        self._context = None
        edited = getattr(self.record, "edited", self.record)
        if isinstance(edited, EditedTokens):
            warn_of(edited, self.edit.label, stacklevel=3)

    def __repr__(self) -> str:
        return f"<OpenEdit {self.edit.label}{' (closed)' if self._context is None else ''}>"


def check_edit(model: Any, edit: Edit, me_layer: MELayer | None) -> None:
    """Refuse an edit that the model cannot have, without running it.

    Raises:  InterventionError, SiteError: naming the setting.
    """
    OpenEdit(model, edit, me_layer).close()
