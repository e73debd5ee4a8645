"""The command line: `dspfx train`, `prune`, `export`, `inspect`, `bench`, `demo`."""

from importlib.metadata import version
from typing import Annotated

import typer

from dspfx.commands.bench import bench
from dspfx.commands.demo import demo
from dspfx.commands.export import export
from dspfx.commands.inspect import inspect
from dspfx.commands.prune import prune
from dspfx.commands.train import train

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dspfx {version('dspfx')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Dynamic structure pruning: smaller, faster convolutional networks of the same function."""


for command in (train, prune, export, inspect, bench, demo):
    app.command()(command)
