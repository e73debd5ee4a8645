"""What all commands have in common: where they print, and how they end.

1. What a command was asked for goes to stdout, all else to stderr. With `--json`, stdout holds one
   JSON document: the result, or `{"error": ...}`.
2. An error is one line and exit code 1; `--debug` shows where it came from.
3. Ctrl-C ends with exit code 130, and says how to go on where that is possible.
4. Modules are found in the current folder, too, as `python` does.
"""

import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer

from dspfx.errors import DspfxError, DspfxWarning
from dspfx.recipe.folder import RunFolder
from dspfx.recipe.team import rank

INTERRUPTED = 130  # as of a process that SIGINT has ended

AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead of text.", show_default=False),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show where an error comes from.", show_default=False)
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that torch uses.")]


# what messages call settings in Python, and the options that set them here
_OPTIONS = (
    (re.compile(r"PrepareConfig\(ignore=\.\.\.\)"), "--ignore"),
    (re.compile(r"\bignore=(?='|\")"), "--ignore "),
)


def say(text: str) -> None:
    """Tell the user, on stderr."""
    typer.echo(in_options(text), err=True)


def in_options(text: str) -> str:
    """`text` with the names of options where it has those of settings in Python."""
    for setting, option in _OPTIONS:
        text = setting.sub(option, text)
    return text


class Session:
    """A command that is running.

    Attributes:
        as_json: whether machines read its output.
        folder: of the run that Ctrl-C interrupts, if it is one.
        machine: the options with which it was begun that no file remembers.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.folder: Path | None = None
        self.machine: list[str] = []
        self._result: tuple[str, Any] | None = None

    def give(self, text: str, plain: Any) -> None:
        """The result, as a text and as plain values, one of which is printed in the end."""
        self._result = text, plain

    def how_to_go_on(self) -> str:
        """The command that resumes an interrupted run, if there is anything to resume."""
        if self.folder is None or not RunFolder(self.folder).config.exists():
            return ""
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        many = ["torchrun", "--nproc-per-node", here, "-m"] if here != "1" else []
        words = [*many, "dspfx", "train", "--resume", "--run-dir", str(self.folder), *self.machine]
        return f"; to go on: {shlex.join(words)}"

    def end(self) -> None:
        """Print the result, once where several processes have it."""
        if self._result is not None and rank() == 0:
            text, plain = self._result
            typer.echo(json.dumps(plain, indent=2) if self.as_json else in_options(text))


@contextmanager
def session(*, debug: bool, as_json: bool, threads: int | None = None) -> Iterator[Session]:
    """Run a command; see above."""
    own = Session(as_json=as_json)
    if threads is not None:
        torch.set_num_threads(threads)
    path = list(sys.path)
    try:
        sys.path.insert(0, os.getcwd())
        with redirect_stdout(sys.stderr), _short_warnings():
            yield own
        own.end()
    except KeyboardInterrupt as error:
        if rank() == 0:
            say(f"\ninterrupted{own.how_to_go_on()}")
        raise typer.Exit(INTERRUPTED) from error
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            raise
        text = in_options(" ".join(str(error).split()))
        if not isinstance(error, DspfxError):
            text = f"unexpected {type(error).__name__}: {text} (--debug shows where)"
        if as_json and rank() == 0:
            typer.echo(json.dumps({"error": text}))
        say(f"error: {text}")
        raise typer.Exit(1) from error
    finally:
        sys.path[:] = path


@contextmanager
def _short_warnings() -> Iterator[None]:
    """What dspfx warns of, in a line of its own, each time."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, DspfxWarning):
                usual(message, category, filename, lineno, file, line)
            elif rank() == 0:
                say(f"warning: {message}")

        warnings.showwarning = show
        warnings.simplefilter("always", DspfxWarning)
        yield
