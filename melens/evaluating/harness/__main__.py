r"""lm-eval with melens' model: ``python -m melens.evaluating.harness --model melens ...``.

lm-eval 0.4.13 finds models by import alone (no entry point; ``--include_path`` is for tasks), so
that plain ``lm_eval --model melens`` cannot know ours. This imports it, makes IFEval's sentence
model ready where a task needs it, adds our tasks for local files, and hands over to lm-eval's own
command line; every option is lm-eval's. From Python, ``import melens.evaluating.harness`` before
``lm_eval.simple_evaluate(model="melens", model_args=...)`` does the same.

    python -m melens.evaluating.harness --model melens --tasks gsm8k --apply_chat_template \
        --model_args pretrained=smollm2-135m,mask_select=gamma,mask_rate=0.5,mask_layers=after
    python -m melens.evaluating.harness --model melens --tasks melens_math500 \
        --model_args pretrained=smollm2-135m --metadata '{"data": "/path/to/data"}'

Answers cached with ``--use_cache`` are kept apart by weights, dtype, chat template and edit.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from melens.errors import COULD_NOT_RUN, INTERRUPTED, MelensError, ModelNotFoundError
from melens.evaluating.harness.data import (
    GENERATION_TASKS,
    OFFLINE_TASKS,
    data_folder,
    items,
    require_punkt,
)
from melens.evaluating.harness.settings import read_settings
from melens.network import pass_on

try:
    from melens.evaluating.harness.model import MelensLM
except MelensError as _error:
    if __name__ != "__main__":
        raise
    sys.exit(f"Error: {_error}")

__all__ = ["MelensLM", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line with ours registered; returns the exit code."""
    pass_on()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    given = list(sys.argv[1:] if arguments is None else arguments)
    before = sys.argv
    sys.argv = ["lm_eval", *_with_our_tasks(given)]  # where lm-eval looks
    try:
        setup_logging()
        theirs = HarnessCLI()
        parsed = theirs.parse_args()
        if parsed.command == "run":
            _prepare(parsed)
        theirs.execute(parsed)
    except MelensError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:  # argparse's own
        return stop.code if isinstance(stop.code, int) else COULD_NOT_RUN if stop.code else 0
    finally:
        sys.argv = before
    return 0


def _prepare(parsed: Namespace) -> None:
    """Check what can be checked before lm-eval reads its tasks and the model is loaded."""
    if parsed.model == "melens":
        settings = dict(parsed.model_args or {})
        if not settings.pop("pretrained", None):
            raise ModelNotFoundError("name the model: --model_args pretrained=smollm2-135m")
        read_settings(settings)
    tasks = str(parsed.tasks)
    if "ifeval" in tasks or "leaderboard" in tasks:
        require_punkt()
    for name in GENERATION_TASKS:
        if f"melens_{name}" in tasks:
            items(name, data_folder(dict(parsed.metadata or {})))


def _with_our_tasks(given: list[str]) -> list[str]:
    """Our task folder added where one of ours is named and no other folder is."""
    ours = any(word.startswith("melens_") or ",melens_" in word for word in given)
    if not ours or any(word.startswith("--include_path") for word in given):
        return given
    return [*given, "--include_path", str(OFFLINE_TASKS)]


if __name__ == "__main__":
    sys.exit(main())
