"""The `hfquant` command: its subcommands, and how errors reach the user."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import CalibrationError, HfQuantError, SpecError
from .backends import backends_command
from .demo import demo_command
from .doctor import doctor_command
from .evaluate import eval_command
from .finetune import finetune_command
from .inspect import inspect_command
from .output import error, quiet_loading
from .quantize import quantize_command


class CleanErrors(TyperGroup):
    """Prints an error of hfquant or of a file operation as one message: exit status 2 for bad input, else 1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--verbose` wherever it stands."""
        rest = [arg for arg in args if arg != "--verbose"]
        return super().parse_args(ctx, ["--verbose", *rest] if len(rest) < len(args) else rest)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of the output went away, which click handles
            raise
        except (HfQuantError, OSError) as problem:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            else:
                error(str(problem))
            raise typer.Exit(2 if isinstance(problem, SpecError | CalibrationError) else 1) from problem


app = typer.Typer(
    name="hfquant",
    cls=CleanErrors,
    help="Quantize Hugging Face models, and see what it costs and saves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"hfquant {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    quiet_loading(verbose)


app.command("quantize")(quantize_command)
app.command("eval")(eval_command)
app.command("finetune")(finetune_command)
app.command("inspect")(inspect_command)
app.command("backends")(backends_command)
app.command("doctor")(doctor_command)
app.command("demo")(demo_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments`, by default those of the process; returns the exit status."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="hfquant")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
