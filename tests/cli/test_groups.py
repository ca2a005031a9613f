"""A group is one object for the command, and an option a field for its user."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from melens.cli.groups import grouped, without


@dataclass(frozen=True)
class Paint:
    colour: Annotated[str, typer.Option(help="A colour.")]
    coats: Annotated[int, typer.Option(min=1, help="How often.")] = 2
    gloss: Annotated[bool, typer.Option("--gloss", help="Shiny.")] = False


@dataclass(frozen=True)
class Primer(Paint):
    coats: Annotated[int, typer.Option(min=1, help="Once is enough.")] = 1


def _app(command):
    app = typer.Typer()
    app.command()(grouped(command))
    return app


def test_fields_are_options_and_come_back_as_one_object():
    seen = []

    def work(wall: Annotated[str, typer.Argument()], *, paint: Paint, fast: bool = False) -> None:
        seen.append((wall, paint, fast))

    run = CliRunner().invoke
    app = _app(work)
    assert run(app, ["north", "--colour", "red", "--gloss", "--fast"]).exit_code == 0
    assert run(app, ["south", "--colour", "blue", "--coats", "3"]).exit_code == 0
    assert seen == [("north", Paint("red", 2, True), True), ("south", Paint("blue", 3), False)]
    assert run(app, ["north"]).exit_code == 2
    assert run(app, ["north", "--colour", "red", "--coats", "0"]).exit_code == 2
    assert list(inspect.signature(grouped(work)).parameters) == [
        "wall",
        "colour",
        "coats",
        "gloss",
        "fast",
    ]


def test_a_subclass_changes_one_option_where_it_stands():
    seen = []

    def work(paint: Annotated[Primer, without("gloss")]) -> None:
        seen.append(paint)

    app = _app(work)
    assert CliRunner().invoke(app, ["--colour", "red"]).exit_code == 0
    assert seen == [Primer("red", 1, False)]
    assert CliRunner().invoke(app, ["--colour", "red", "--gloss"]).exit_code == 2
    found = inspect.signature(grouped(work)).parameters
    assert list(found) == ["colour", "coats"]
    assert found["coats"].annotation.__metadata__[0].help == "Once is enough."


def test_a_field_that_is_not_there_cannot_be_left_out():
    def work(paint: Annotated[Paint, without("shine")]) -> None: ...

    with pytest.raises(KeyError, match="shine"):
        grouped(work)


def test_an_option_of_two_groups_is_refused():
    def work(paint: Paint, coats: int = 1) -> None: ...

    with pytest.raises(ValueError, match="coats"):
        grouped(work)
