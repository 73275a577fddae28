"""Simulated federations: the deployed apps on an in-process grid, and central training beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from flwr.app import Context
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from client.app import make_app
from client.owner import Owner, open_owner
from crypto.trust import load_trust
from protocol.errors import PlanInvalid
from protocol.evaluation import planned_worst_epsilon, promised_loss
from protocol.plan import Plan, first_problem, toml_fields
from protocol.storage import read_written
from scenarios.central import CentralTraining, prepare_central
from scenarios.federation import PolicySettings, make_federation
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.home import IDENTITY, PUBLIC_DATA
from server.store import RunStore
from tasks.partition import Shard, digits, fashion_mnist, write_examples
from tasks.registry import task_for
from tasks.resolve import resolve

_FIRST_NODE = 100


class Scenario(BaseModel):
    """A simulated federation, or central training, as its TOML file describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    plan: str = Field(description="Plan file, relative to the scenario file.")
    kind: Literal["federated", "central"] = Field(
        default="federated",
        description="`central` trains on all rows as one party, without encryption: the bar to reach.",
    )
    data: Literal["digits", "fashion-mnist"] = Field(default="digits", description="Source of the rows.")
    holdout_rows: Annotated[int, Field(ge=0, le=30_000)] = Field(
        default=0,
        description="Training rows of `fashion-mnist` that replace its test set, for choosing constants.",
    )
    owners: Annotated[int, Field(ge=1, le=256)] = Field(description="Number of simulated owners.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Decides who owns which rows.")
    workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="Owners that work at the same time; 0 runs one after the other."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "central" and self.owners != 1:
            raise ValueError("owners must be 1 where kind is 'central'")
        if self.holdout_rows and self.data != "fashion-mnist":
            raise ValueError("holdout_rows needs data = 'fashion-mnist'")
        return self

    def rows(self) -> tuple[list[Shard], Shard]:
        """Return the owners' rows and the public ones, raw.

        Raises:
            DatasetMissing: The files of the source are not on this machine.
        """
        if self.data == "fashion-mnist":
            return fashion_mnist(self.seed, self.owners, self.holdout_rows)
        return digits(self.seed, self.owners)

    @classmethod
    def read(cls, file: Path) -> tuple[Scenario, Plan]:
        """Read a scenario and its plan.

        Raises:
            PlanInvalid: The scenario or its plan is not valid; names the field.
        """
        text = read_written(file, PlanInvalid)
        try:
            scenario = cls.model_validate(toml_fields(text))
        except ValidationError as error:
            raise PlanInvalid(first_problem(error)) from None
        except ValueError as error:
            raise PlanInvalid(f"{file.name}: not TOML: {error}") from None
        return scenario, Plan.from_toml(read_written(file.parent / scenario.plan, PlanInvalid))


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


def build(scenario: Scenario, plan: Plan, folder: Path) -> Simulation | CentralTraining:
    """Make what a scenario describes, ready to run.

    Args:
        scenario: Kind, source and split of the rows, workers.
        plan: As read; it is resolved here.
        folder: New or empty.

    Raises:
        DatasetMissing: The rows are not on this machine.
        PlanInvalid, CapacityExceeded, NoiseTooSmall: See `tasks.resolve.resolve`.
    """
    resolved = resolve(plan)
    shards, public = scenario.rows()
    run = folder / "run"
    if scenario.kind == "central":
        training = prepare_central(resolved, task_for(resolved).check(*shards[0]), run)
        write_examples(run / PUBLIC_DATA, *public)
        return training
    simulation = federate(resolved, shards, folder, scenario.workers)
    write_examples(run / PUBLIC_DATA, *public)
    return simulation


def federate(plan: Plan, shards: Sequence[Shard], folder: Path, workers: int = 0) -> Simulation:
    """Make a federation in a folder and put its apps on an in-process grid.

    Args:
        plan: Resolved.
        shards: Raw rows of each owner.
        folder: New or empty.
        workers: See `Scenario`.
    """
    federation = make_federation(folder, shards, policy_for(plan))
    homes = enumerate(federation.owners, start=_FIRST_NODE)
    owners = {node: open_owner(home.folder, home.passphrase) for node, home in homes}
    apps = {node: make_app(partial(_fixed, owner)) for node, owner in owners.items()}
    store = RunStore(folder / "run")
    store.set("plan", plan.fields())
    store.set("plan_hash", plan.sha256())
    trust = load_trust(federation.server_home / IDENTITY)
    return Simulation(store, LocalGrid(apps, workers), owners, trust)


def policy_for(plan: Plan) -> PolicySettings:
    """Return a policy that allows the plan, twice."""
    promised, delta = promised_loss(plan)
    epsilon = promised or 1.0
    shares = plan.privacy.noise == "distributed"
    worst = 2 * max(epsilon, planned_worst_epsilon(plan) or 0.0) if shares else None
    return PolicySettings(
        epsilon_total=2 * epsilon,
        epsilon_per_run=epsilon,
        delta_total=2 * delta,
        min_cohort=max(3, plan.cohort.minimum),
        allow_ckks=plan.encryption.preset == "ckks",
        allow_seal_frames=plan.encryption.frames == "seal",
        epsilon_worst=worst,
        units=(plan.privacy.unit,),
        min_known_peers=max(2, plan.privacy.tolerated_colluders + 1) if shares else 2,
    )


def _fixed(owner: Owner, _context: Context) -> Owner:
    return owner
