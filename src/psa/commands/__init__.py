"""The larger commands, one in a file, and what they share."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import PSAError, one_line


def run_app(app: typer.Typer) -> None:
    """Runs a command line: a PSAError, or a file that cannot be written, is one line on stderr and exit code 2."""
    try:
        app()
    except PSAError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(text: str) -> None:
    Console(stderr=True).print(f"[red]error:[/red] {escape(text)}", highlight=False, soft_wrap=True)
    sys.exit(2)
