"""How a command ends: by an error, a signal, or an output that nobody takes any more.

Whatever happens, a person reads a code, the reason and what to do, never a traceback, unless
`FEDSEAL_DEBUG` or `--debug` asks for it. A traceback may quote data: it is for this machine alone.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from protocol.environment import heeded
from protocol.errors import FedsealError, FileDamaged, OutputLost, Unexpected
from protocol.storage import from_os, from_sqlite

DEBUG_VARIABLE: Final = "FEDSEAL_DEBUG"
"""Environment variable that asks for tracebacks."""

INTERRUPTED: Final = 130
CLOSED: Final = 128 + signal.SIGPIPE
"""Exit status where the reader of the output has gone, as of any program that SIGPIPE ends."""


class Output(Console):
    """A console that breaks no line, and ends the command quietly when nobody reads it any more."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as Rich does, but let the terminal break lines of text, which it copies whole."""
        if all(isinstance(one, str | Text) for one in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """End with the status of a program that a closed pipe ends; nothing more can be said."""
        discard_output()
        raise SystemExit(CLOSED)


def ended(command: Callable[[], None]) -> int:
    """Run a command, say how it ended if it did not end well, and return its exit status.

    Args:
        command: May raise anything; ends by `SystemExit` as Typer's commands do.
    """
    try:
        command()
    except SystemExit as ending:
        return _flushed(ending.code)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return CLOSED
    except Exception as error:
        return _explained(error)
    return _flushed(0)


def prepare_output() -> None:
    """Let standard streams take every character, and be there even where they were closed.

    A descriptor that is closed would be given to the next file that is opened, and what is printed would
    be written into that file. A character that the output's encoding lacks is replaced: a verdict with a
    question mark in it is still a verdict.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the system gives the lowest number that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  it stays open
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  it stays open
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=errors)


def heed_signals() -> None:
    """Treat being told to end like Ctrl-C, so that whatever was started is stopped too.

    A signal that whoever started this process has set to be ignored, as nohup does, stays ignored.
    """
    for number in heeded(signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def discard_output() -> None:
    """Send what is still to be printed nowhere; Python would try once more at its end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def coded(error: Exception) -> FedsealError:
    """Return the coded error that stands for any error."""
    if isinstance(error, FedsealError):
        return error
    known: FedsealError | None = None
    if isinstance(error, OSError):
        known = from_os(error)
    elif isinstance(error, sqlite3.Error):
        known = from_sqlite(error, "a database", Path.cwd() / "database", FileDamaged)
    elif isinstance(error, UnicodeError):
        return Unexpected(f"{type(error).__name__}: a text is in another encoding than UTF-8")
    return known or Unexpected(type(error).__name__)


def _explained(error: Exception) -> int:
    # an error without a file's name may be that of the output, which a trial tells
    lost = _output_error(trial=isinstance(error, OSError) and error.filename is None)
    shown = OutputLost(lost) if lost and isinstance(error, OSError) else coded(error)
    if lost:
        discard_output()
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        _say("".join(traceback.format_exception(error)))
    _say(shown.explain(), style="red")
    return shown.exit_code


def _flushed(status: str | int | None) -> int:
    """Return an exit status, or that of an output which did not arrive."""
    lost = _output_error()
    if lost:
        discard_output()
        shown = OutputLost(lost)
        _say(shown.explain(), style="red")
        return shown.exit_code
    if isinstance(status, str):
        _say(status)
        return 1
    return status or 0


def _output_error(*, trial: bool = False) -> str:
    """Return why standard output takes no more, empty if it does; a trial writes an empty line."""
    try:
        if trial:
            sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    except ValueError:
        # it was closed on purpose
        pass
    return ""


def _say(text: str, style: str = "") -> None:
    # Lines are left to the terminal to break: what is to be copied stays whole.
    with suppress(OSError, ValueError):
        Console(stderr=True, highlight=False).print(Text(text, style=style), soft_wrap=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
