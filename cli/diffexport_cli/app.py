"""``diffx``: a command parses, calls one library function, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys

import typer

from diffexport_cli.bench import bench
from diffexport_cli.build import build
from diffexport_cli.doctor import doctor
from diffexport_cli.embed import embed
from diffexport_cli.export import export
from diffexport_cli.inspect import inspect
from diffexport_cli.plan import plan
from diffexport_cli.sample import sample
from diffexport_cli.train import train
from diffexport_cli.verify import verify

app = typer.Typer(
    name="diffx",
    help="Take a trained diffusion model out of PyTorch and sample the same images on any runtime.\n\n"
    "A first run:  diffx export dit.pt  and then  diffx sample dit.diffx --out grid.png",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (export, sample, verify, inspect, build, embed, plan, bench, doctor, train):
    app.command(no_args_is_help=command in (export, train))(command)


def _version(wanted: bool) -> None:
    if wanted:
        import diffexport

        print(f"diffx {diffexport.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    if debug:
        os.environ["DIFFX_DEBUG"] = "1"


def main() -> None:
    """Run the command line. Exit status: 0 well, 1 an error or a failed check, 2 a wrong call, 130 interrupted."""
    from diffexport.errors import DiffexportError
    from diffexport.files import why

    try:
        app()
    except (DiffexportError, OSError) as error:
        if os.environ.get("DIFFX_DEBUG"):
            raise
        if isinstance(error, OSError):  # where nothing better was to be said of it
            error = DiffexportError(f"{error.filename}: {why(error)}" if error.filename else why(error))
        print(f"diffx: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("diffx: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
