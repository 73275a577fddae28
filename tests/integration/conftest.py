"""One federation of real processes that the tests of a session share, and simulated ones for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_federation import RealFederation, federation_of, made_federation
from scene import Scene

UNREGISTERED = "owner-4"


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    """Three owners and a coordinator; a fourth owner is not registered, and a fifth has no node."""
    made = made_federation(tmp_path_factory.mktemp("real") / "federation", owners=4, more=1)
    for file in (made.server_home / "members").glob(f"{UNREGISTERED}.*"):
        file.unlink()
    with federation_of(made, made.owners[:3]) as federation:
        yield federation


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(owners: int, **sections: dict[str, Any]) -> Scene:
        made.append(Scene(tmp_path / f"scene-{len(made)}", owners, **sections))
        return made[-1]

    yield make
    for one in made:
        one.simulation.close()
