"""A check and its outcome, and the table that people read."""

import logging
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Literal

from hydra.errors import InstantiationException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ldm_train.data import ShardReadError
from ldm_train.data.locations import shown
from ldm_train.data.storage import explained

State = Literal["ok", "warning", "failed", "not checked"]

FAILURES = (
    ValueError,
    OSError,
    RuntimeError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    ArithmeticError,
    MemoryError,
    pickle.UnpicklingError,
    InstantiationException,
    ShardReadError,
)
"""What building or running a part may end with: the check that meets one of these has failed, and the next follows."""

_WIDTH = 120  # characters, where the output is a file
_STYLES = {"ok": "green", "warning": "yellow", "failed": "red", "not checked": "dim"}
_ALLOWED = re.compile(r"(?:[;.,:]\s+|\n\s*)(?=[Aa]llowed)|[;.]\s+(?=change `|A resumed run must)")


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was looked at.
        state: how it is; `failed` alone makes the whole fail.
        figure: what was found.
        remedy: what to do about it.
    """

    name: str
    state: State
    figure: str
    remedy: str = ""


def failed(name: str, error: BaseException, remedy: str = "see the message") -> Check:
    """The check that met an error; messages of this package say themselves what to do."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    text = shown(explained(error, remedy)) if isinstance(error, Exception) else str(error)
    found, allowed = _split(text.strip() or type(error).__name__)
    if not isinstance(error, ValueError | OSError | ShardReadError):
        found = f"{type(error).__name__}: {found}"
    return Check(name, "failed", found, allowed or remedy)


def _split(text: str) -> tuple[str, str]:
    """What a message found, and what it says to do."""
    cut = _ALLOWED.search(text)
    return (text, "") if cut is None else (text[: cut.start()], text[cut.end() :])


def show(checks: Sequence[Check], title: str) -> None:
    """Print the table."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("check", "state", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        style = _STYLES[check.state]
        table.add_row(check.name, f"[{style}]{check.state}[/{style}]", _plain(check.figure), _plain(check.remedy))
    console.print(table, highlight=False)


@contextmanager
def silent() -> Iterator[None]:
    """What parts and small runs say of themselves is about weights and networks that nobody asked for."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        stack.enter_context(redirect_stdout(StringIO()))
        yield


def _plain(text: str) -> str:
    return escape(text)
