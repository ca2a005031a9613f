"""How commands read what was typed: an empty value is refused, as of a shell's unset variable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from melens.cli.help import HelpedCommand, place, value_kind

if TYPE_CHECKING:  # older versions of typer have click's own
    from typer._click import Context, Parameter


class StrictCommand(HelpedCommand):
    """A command that refuses empty options and paths; an empty path would be this folder."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Parse.

        Raises:  typer.BadParameter: naming the empty one.
        """
        typed: dict[str, object] = {}
        if not ctx.resilient_parsing:
            typed, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        left = super().parse_args(ctx, args)  # --help ends here
        for param in self.get_params(ctx):
            _refuse_empty(typed.get(str(param.name)), param, ctx)
        return left


def _refuse_empty(value: object, param: Parameter, ctx: Context) -> None:
    is_option = param.param_type_name == "option"
    if not is_option and value_kind(param).name != "path":
        return  # a name, of which its command says what fits
    if value == "" or (isinstance(value, (list, tuple)) and "" in value):
        way_out = "" if param.required else ", or leave it out"
        names = param.opts if is_option else [place(param).strip("[]")]
        hint = " / ".join(f"'{name}'" for name in names)
        raise typer.BadParameter(f"it is empty; give a value{way_out}.", ctx=ctx, param_hint=hint)
