"""Loaded by every Python process of a federation under test: lets it be killed at a named step.

The product knows nothing of this. A folder named in the environment may hold a file ``server`` or the name
of an owner, with the name of a step and, in further lines, the process ids that die with it. The process
that reaches the step removes the file, so that it dies once, and kills all of them and itself. With a line
``alone`` it kills the others and goes on.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("FEDSEAL_TEST_KILL")


class Kill:
    """Kills this process when a step is reached that the folder asks for."""

    def __init__(self, name: str, step: str) -> None:
        self._file = Path(str(FOLDER)) / name
        self._step = step

    def strike(self) -> None:
        """Die, if it is this step's turn."""
        try:
            step, *others = self._file.read_text().splitlines()
        except FileNotFoundError:
            return
        if step != self._step:
            return
        self._file.unlink()
        for pid in (int(one) for one in others if one != "alone"):
            # the process of the run before may have ended since it was named
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if "alone" not in others:
            os.kill(os.getpid(), signal.SIGKILL)


class Setter:
    """Replaces attributes for good."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        """Replace one."""
        setattr(target, name, value)


def patch_server() -> None:
    """Prepare the coordinator's process of one run."""
    from steps import ROSTER_STEPS, SERVER_STEPS

    for step, made in {**SERVER_STEPS, **ROSTER_STEPS}.items():
        made()(Setter(), Kill("server", step))


def patch_owner() -> None:
    """Prepare an owner's node, whose home's folder has the owner's name."""
    from sends import half_sent, sent
    from steps import owner_steps

    home = Path(sys.argv[sys.argv.index("--home") + 1]).name
    for step, made in owner_steps(lambda _one: True).items():
        made()(Setter(), Kill(home, step))
    half_sent(Setter(), Kill(home, "half the frames sent"))
    sent(Setter(), Kill(home, "sent"))


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function once a module has been imported."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self._name = name
        self._act = act

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        """Let the other finders find the module, and act behind its loader."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run, act = spec.loader.exec_module, self._act

        def run_and_act(module: ModuleType) -> None:
            run(module)
            sys.modules[name] = module
            act()

        spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


if FOLDER is not None:
    sys.path.append(str(Path(__file__).parent.parent))
    sys.meta_path.insert(0, AfterImport("server.strategy", patch_server))
    if "client" in sys.argv:
        sys.meta_path.insert(0, AfterImport("client.node", patch_owner))
