"""Simulated federations: the deployed apps on an in-process grid."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from flwr.app import Context
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.app import make_app
from client.owner import Owner, open_owner
from crypto.pki import load_trust
from protocol.errors import PlanInvalid
from protocol.plan import Plan, first_problem
from scenarios.federation import PolicySettings, make_federation
from scenarios.grid import LocalGrid
from server.app import PUBLIC_DATA, run_plan
from server.store import RunStore
from server.submit import IDENTITY
from tasks.partition import digits, write_examples
from tasks.resolve import resolve

_FIRST_NODE = 100


class Scenario(BaseModel):
    """A simulated federation, as its TOML file describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    plan: str = Field(description="Plan file, relative to the scenario file.")
    owners: Annotated[int, Field(ge=1, le=256)] = Field(description="Number of simulated owners.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Decides who owns which rows.")
    workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="Owners that work at the same time; 0 runs one after the other."
    )

    @classmethod
    def read(cls, file: Path) -> tuple[Scenario, Plan]:
        """Read a scenario and its plan.

        Raises:
            PlanInvalid: The scenario or its plan is not valid; names the field.
        """
        try:
            scenario = cls.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
            text = (file.parent / scenario.plan).read_text(encoding="utf-8")
        except ValidationError as error:
            raise PlanInvalid(first_problem(error)) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            raise PlanInvalid("the scenario file or its plan cannot be read") from None
        return scenario, Plan.from_toml(text)


@dataclass
class Simulation:
    """A federation in this process, ready to run.

    Attributes:
        store: The run's store.
        grid: The in-process grid.
        owners: The open owners, by node id.
        trust: The federation's authority.
    """

    store: RunStore
    grid: LocalGrid
    owners: dict[int, Owner]
    trust: Any

    def run(self) -> None:
        """Run the plan to its end.

        Raises:
            FedsealError: Why the run did not finish.
        """
        run_plan(self.grid, self.store, self.trust)

    def close(self) -> None:
        """Release files and threads."""
        self.grid.close()
        for owner in self.owners.values():
            owner.close()
        self.store.close()


def build(scenario: Scenario, plan: Plan, folder: Path) -> Simulation:
    """Make a federation in a folder and put its apps on an in-process grid.

    Args:
        scenario: Owners, split, workers.
        plan: As read; it is resolved here.
        folder: New or empty.
    """
    resolved = resolve(plan)
    splits, public = digits(seed=scenario.seed, owners=scenario.owners)
    epsilon = resolved.privacy.target_epsilon or 1.0
    settings = PolicySettings(
        epsilon_total=2 * epsilon,
        epsilon_per_run=epsilon,
        min_cohort=max(3, resolved.cohort.minimum),
        allow_ckks=resolved.encryption.preset == "ckks",
    )
    federation = make_federation(folder, splits, settings)
    homes = enumerate(federation.owners, start=_FIRST_NODE)
    owners = {node: open_owner(home.folder, home.passphrase) for node, home in homes}
    apps = {node: make_app(partial(_fixed, owner)) for node, owner in owners.items()}
    store = RunStore(folder / "run")
    store.set("plan", resolved.fields())
    store.set("plan_hash", resolved.sha256())
    write_examples(store.folder / PUBLIC_DATA, *public)
    trust = load_trust(federation.server_home / IDENTITY)
    return Simulation(store, LocalGrid(apps, scenario.workers), owners, trust)


def _fixed(owner: Owner, _context: Context) -> Owner:
    return owner
