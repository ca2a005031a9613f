"""The command group, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

from melens import __version__
from melens.cli.commands.census import census
from melens.cli.commands.check import check
from melens.cli.commands.diff import diff
from melens.cli.commands.evaluate import evaluate, tune
from melens.cli.commands.export import export, generate
from melens.cli.commands.finetune import finetune
from melens.cli.commands.isolate import isolate, super_weights
from melens.cli.commands.locate import env, known, locate, models, plot
from melens.cli.commands.long_context import long_context
from melens.cli.commands.measure import attention, collapse, describe, metric, mixers, sinks
from melens.cli.commands.patch import patch
from melens.cli.commands.quantise import quantise
from melens.cli.commands.recipes import recipes
from melens.cli.commands.scan import reach, scan
from melens.cli.commands.sidecar import sidecar
from melens.cli.commands.sweep import results, sweep
from melens.cli.groups import grouped
from melens.cli.help import HelpedGroup
from melens.cli.parsing import StrictCommand
from melens.cli.stdout import printing
from melens.errors import (
    BAD_INPUT,
    COULD_NOT_RUN,
    INTERRUPTED,
    EditWarning,
    MelensError,
    is_out_of_memory,
)
from melens.formatting import LAYOUT, printable
from melens.network import pass_on
from melens.progress import one_command, tell
from melens.registry import did_you_mean

if TYPE_CHECKING:
    from typer._click import ClickException
else:  # typer carries a click of its own in newer versions and uses the installed one in older
    ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

NOT_ONE_OF = re.compile(r"'([^']*)' is not one of ('.*')")
QUOTED = re.compile(r"'([^']*)'")

app = typer.Typer(
    name="melens",
    cls=HelpedGroup,
    help="Find the layer where a language model's massive activations emerge, and what they do. "
    "Layers count from 0, at the block output. Exit codes: 0 done, 1 a finding or a difference, "
    "2 bad usage or bad input, 3 could not run, 130 interrupted.",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"melens {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; works after a command too.")
    ] = False,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Keep no converted copy of a .gguf file; works after a command too.",
        ),
    ] = False,
) -> None:
    """Options of every command; :func:`main` takes all but ``version`` out of the arguments."""


COMMANDS = (
    locate,
    scan,
    describe,
    collapse,
    metric,
    sinks,
    mixers,
    attention,
    isolate,
    super_weights,
    patch,
    evaluate,
    long_context,
    export,
    generate,
    sidecar,
    quantise,
    recipes,
    tune,
    finetune,
    check,
    diff,
    reach,
    census,
    sweep,
    results,
    known,
    plot,
    models,
    env,
)
for _command in COMMANDS:
    app.command("eval" if _command is evaluate else None, cls=StrictCommand)(grouped(_command))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; whatever goes wrong is one line on stderr and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if "--no-cache" in arguments:
        os.environ["MELENS_NO_CACHE"] = "1"
    arguments = [word for word in arguments if word not in ("--debug", "--no-cache")]
    _quiet_libraries(debug=debug)
    sys.exit(_run(arguments, debug=debug))


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        with printing():
            ended = attempt(arguments or ["--help"], debug=debug)
    except (KeyboardInterrupt, typer.Abort):
        ended = Ended(INTERRUPTED)
    if ended.code == INTERRUPTED:
        tell(
            "interrupted; no half-written file is left, and what --out holds of finished work is "
            "kept. Run the same command again."
        )
    elif ended.error:
        tell(ended.error)
    return ended.code if arguments else ended.code or BAD_INPUT


@cache
def group() -> TyperGroup:
    """All commands as click has them, made once: one process may run many."""
    made = get_command(app)
    assert isinstance(made, TyperGroup)
    return made


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    error: str = ""
    """What went wrong, in one line."""
    out_of_memory: bool = False


def attempt(arguments: list[str], *, debug: bool = False) -> Ended:
    """Run a command; what goes wrong is returned, not told.

    Raises:  KeyboardInterrupt, typer.Abort: the user interrupted it.
    """
    try:
        with one_command(), _edits_said():
            code = group()(arguments, prog_name="melens", standalone_mode=False)
        return Ended(code if isinstance(code, int) else 0)
    except MelensError as error:
        return _ended(str(error), error.exit_code, debug=debug)
    except ClickException as error:
        if debug:
            raise
        return Ended(BAD_INPUT, _usage(error))
    except typer.Abort:
        raise
    except Exception as error:  # the last resort: a user never sees a traceback unasked
        if is_out_of_memory(error):
            said = "out of memory; try a smaller --batch-size or --length."
            return replace(_ended(said, COULD_NOT_RUN, debug=debug), out_of_memory=True)
        first = (str(error).strip().splitlines() or [""])[0][:300]
        text = f"could not run ({type(error).__name__}: {first}); --debug shows where."
        return _ended(text, COULD_NOT_RUN, debug=debug)


@contextmanager
def _edits_said() -> Iterator[None]:
    """Warnings of edits as notes at the end, each once; other warnings as they are."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", EditWarning)
        try:
            yield
        finally:
            ours = [one for one in found if issubclass(one.category, EditWarning)]
            for text in dict.fromkeys(str(one.message) for one in ours):
                tell(f"note: {text}")
    for one in found:
        if one not in ours:
            warnings.showwarning(one.message, one.category, one.filename, one.lineno)


def _usage(error: ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" See: {context.command_path} --help" if context else ""
    message = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's words
    end = "" if message.endswith("?") else "."
    return " ".join(f"{message}{end}{_meant(message)}{hint}".split()) if message else ""


def _meant(message: str) -> str:
    """The closest of the values that an option takes, which only typer's own words name."""
    refused = NOT_ONE_OF.search(message)
    return did_you_mean(refused[1], QUOTED.findall(refused[2])) if refused else ""


def _ended(text: str, code: int, *, debug: bool) -> Ended:
    if debug:
        import traceback

        sys.stderr.write(printable(traceback.format_exc(), keep=LAYOUT))
    return Ended(code, " ".join(text.split()))


def _quiet_libraries(*, debug: bool) -> None:
    """No telemetry, no bars of other libraries off a terminal, no library warnings unless asked."""
    pass_on()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
