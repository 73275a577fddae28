"""``fedseal run``: begin or resume a run, follow it, package its model and write its report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.text import Text

from console.ending import coded
from console.progress import RunProgress
from console.show import warn_if_unprotected
from protocol.errors import FedsealError, RunInterrupted, RunPaused
from protocol.plan import Plan

if TYPE_CHECKING:
    from server.listeners.control import ControlLink
    from server.store import RunStore


def begin_run(
    console: Console,
    home: Path,
    plan: Plan,
    public_data: Path | None,
    out: Path | None,
    passphrase: bytes,
    link: ControlLink,
) -> None:
    """Submit a plan as a new run and see it through."""
    from audit.deliverable import require_deliverable
    from server.addresses import read_addresses
    from server.release import release_key
    from server.submit import prepare_run, submit
    from tasks.resolve import resolve

    read_addresses(home)
    key = release_key(home, passphrase)
    require_deliverable(resolve(plan), home, out)
    warn_if_unprotected(console, plan)
    store = prepare_run(home, plan, public_data)
    console.print(f"run folder: {store.folder}", soft_wrap=True)
    with _told_if_interrupted(console, home, store, out):
        submit(home, store, link)
        _see_through(console, home, store, key, out, after=0)


def resume_run(
    console: Console,
    home: Path,
    run: str,
    public_data: Path | None,
    out: Path | None,
    passphrase: bytes,
    link: ControlLink,
) -> None:
    """Go on with a run after its last finished round, or only follow it where it is under way.

    A finished run gets its package and report again, measured on the public data if some are given.
    """
    from audit.deliverable import require_deliverable
    from server.release import release_key
    from server.runs import note_interruption, open_run
    from server.submit import add_public_data, submit
    from server.watch import last_event

    store = open_run(home, run)
    key = release_key(home, passphrase)
    note_interruption(store)
    plan, after = store.plan(), last_event(store)
    if store.get("state") != "failed":
        require_deliverable(plan, home, out, store)
    if public_data is not None:
        add_public_data(store, plan, public_data)
    warn_if_unprotected(console, plan)
    console.print(f"run folder: {store.folder}", soft_wrap=True)
    finished = f"{store.finished_rounds()} of {plan.run.rounds} rounds are finished"
    console.print(Text(f"● {finished}", style="bold"))
    with _told_if_interrupted(console, home, store, out):
        if not store.is_carried_out() and store.get("state") != "finished":
            submit(home, store, link)
        _see_through(console, home, store, key, out, after)


def _command_to_go_on(home: Path, store: RunStore, out: Path | None) -> str:
    """Return the command that goes on with a run, or follows it, with its result at the same place."""
    words = ["fedseal", "run", "--resume", store.folder.name, "--home", str(home)]
    return shlex.join(words if out is None else [*words, "--out", str(out)])


@contextmanager
def _told_if_interrupted(console: Console, home: Path, store: RunStore, out: Path | None) -> Iterator[None]:
    """Say what becomes of a run whose command is interrupted, and how to follow or to stop it."""
    try:
        yield
    except KeyboardInterrupt:
        name = store.folder.name
        follow = _command_to_go_on(home, store, out)
        if store.get("state") in ("finished", "failed", "paused"):
            console.print(Text("● interrupted; the run has ended", style="bold yellow"))
            console.print(f"to write its report: {follow}", soft_wrap=True)
        else:
            console.print(Text("● interrupted; the run goes on at the coordinator", style="bold yellow"))
            console.print(f"to follow it: {follow}", soft_wrap=True)
            console.print(f"to stop it: fedseal stop {name} --home {home}", soft_wrap=True)
        raise


def _see_through(
    console: Console, home: Path, store: RunStore, key: Ed25519PrivateKey, out: Path | None, after: int
) -> None:
    """Print a run's progress, then package the model and write the report.

    Raises:
        RunPaused, RunInterrupted: It can be resumed; how is printed.
        RunFailed, ServerUnavailable: See `server.watch.follow`. What fails afterwards never takes the place
            of these.
        FedsealError: Why a finished run has no package or no report.
    """
    from server.watch import follow

    plan = store.plan()
    progress = RunProgress(console, plan.run.rounds, protected=plan.privacy.noise != "none")
    cause: FedsealError | None = None
    try:
        follow(store, progress.show, after)
    except FedsealError as error:
        cause = error
    if isinstance(cause, RunPaused | RunInterrupted):
        rounds = f"{store.finished_rounds()} of {plan.run.rounds} rounds"
        console.print(Text(f"● paused; {rounds} are finished and kept", style="bold yellow"))
        console.print(f"to go on: {_command_to_go_on(home, store, out)}", soft_wrap=True)
    try:
        if store.get("state") in ("finished", "failed", "paused"):
            _conclude(console, home, store, key, out or _own_folder(store, plan), progress)
    except Exception as later:
        if cause is None:
            raise
        _say_second(console, later)
    if cause is not None:
        raise cause


def _own_folder(store: RunStore, plan: Plan) -> Path:
    """Return the folder of a run in which its package has not been written yet."""
    from deploy.package import SUFFIX

    folder = store.folder / "result"
    for number in count(2):
        if not (folder / f"{plan.run.name}{SUFFIX}").exists():
            break
        folder = store.folder / f"result-{number}"
    return folder


def _conclude(
    console: Console,
    home: Path,
    store: RunStore,
    key: Ed25519PrivateKey,
    out: Path,
    progress: RunProgress,
) -> None:
    """Package the model of a finished run, write the report, and say where they are.

    Raises:
        FedsealError: Why a finished run has no package; its report is written before.
    """
    from audit.conclude import conclude

    conclusion = conclude(store, home, key, out, lambda text: progress.show("step", {"text": text}))
    console.print(f"report: {conclusion.verdict['status']}  {conclusion.report_html}", soft_wrap=True)
    if conclusion.package is not None:
        console.print(f"package: {conclusion.package}", soft_wrap=True)
    if conclusion.problem is not None:
        raise conclusion.problem


def _say_second(console: Console, later: Exception) -> None:
    """Tell of a failure that followed another, which decides how the command ends."""
    said = coded(later).explain()
    console.print(Text(f"after that, the report could not be written: {said}", style="yellow"))
