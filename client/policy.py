"""An owner's policy: what this owner, and nobody else, allows to be done with its data.

The file `policy.toml` lies beside the data. A plan outside the policy is refused before anything
touches data, and no message of a coordinator can change the policy.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.encoding import Digest
from protocol.errors import PolicyInvalid, PolicyRefused
from protocol.evaluation import planned_epsilon, planned_worst_epsilon, promised_loss
from protocol.plan import Plan, first_problem, toml_fields
from protocol.sections import Name, Positive

Probability = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all policy sections: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Budget(Section):
    """Caps on the privacy loss of one unit of this dataset; all runs on it must have the same unit."""

    epsilon_total: Positive = Field(description="Most epsilon over all runs, for ever.")
    epsilon_per_run: Positive = Field(description="Most epsilon of one run; at most `epsilon_total`.")
    epsilon_worst: Positive | None = Field(
        default=None,
        description="Most epsilon over all runs if all other owners collude against this one; at least "
        "`epsilon_total`. Needed for `plans.allow_distributed_noise`.",
    )
    delta_total: Probability = Field(description="Most delta over all runs, for ever.")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.epsilon_per_run > self.epsilon_total:
            raise ValueError("epsilon_per_run must not be above epsilon_total")
        if self.epsilon_worst is not None and self.epsilon_worst < self.epsilon_total:
            raise ValueError("epsilon_worst must not be below epsilon_total")
        return self


class AllowedPlans(Section):
    """Which plans this owner takes part in."""

    tasks: list[Name] = Field(min_length=1, description="Allowed values of a plan's `task.name`.")
    models: list[Name] = Field(min_length=1, description="Allowed values of a plan's `model.name`.")
    min_cohort: int = Field(
        default=3, ge=1, le=1024, description="Fewest owners, this one included, that may be summed."
    )
    allow_small: bool = Field(
        default=False,
        description="Accept a `min_cohort` below 3. With two owners each sees the other's exact update.",
    )
    allow_close_lists: bool = Field(
        default=False,
        description="Without noise, accept a list that differs from an earlier one in a single owner; the "
        "two sums then reveal that owner's update.",
    )
    min_weight: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Smallest weight that a plan may give an owner; tiny weights of others would leave one "
        "owner's update alone in the sum.",
    )
    allow_ckks: bool = Field(
        default=False,
        description="Accept plans with `encryption.preset = 'ckks'`, a compatibility scheme with weaker "
        "guarantees; see docs/encryption.md.",
    )
    allow_seal_frames: bool = Field(
        default=False,
        description="Accept plans with `encryption.frames = 'seal'`: bytes that other owners signed then "
        "reach SEAL's parser; see docs/encryption.md.",
    )
    units: list[Literal["example", "client"]] = Field(
        default=["example"],
        min_length=1,
        max_length=2,
        description="Allowed values of a plan's `privacy.unit`.",
    )
    allow_distributed_noise: bool = Field(
        default=False,
        description="EXPERIMENTAL. Accept plans with `privacy.noise = 'distributed'`: the promised epsilon "
        "then rests on other owners adding their noise; see docs/privacy.md.",
    )
    allow_no_privacy: bool = Field(
        default=False, description="Accept plans with `privacy.noise = 'none'`, which protect no record."
    )

    @model_validator(mode="after")
    def _size(self) -> Self:
        if self.min_cohort < 3 and not self.allow_small:
            raise ValueError("min_cohort below 3 needs allow_small = true")
        return self


class Peers(Section):
    """Which other owners this owner knows, by keys that it got from them and not from a coordinator."""

    pinned: dict[Name, Digest] = Field(
        default={},
        description="Names and fingerprints (SHA-256 of the signing public key) of known owners.",
    )
    min_known_peers: int = Field(
        default=2,
        ge=0,
        le=1024,
        description="Pinned owners that every list must hold; at least one more than may collude.",
    )
    demo: bool = Field(
        default=False,
        description="Accept `min_known_peers = 0`: the coordinator may then invent all peers.",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.min_known_peers == 0 and not self.demo:
            raise ValueError("min_known_peers = 0 needs demo = true")
        return self


class Policy(Section):
    """A whole policy; `Policy.from_toml` reads the file's text."""

    dataset: Name = Field(
        description="Name under which the budget is kept. Data about the same people has one name."
    )
    data_file: str = Field(min_length=1, description="Path of the data, relative to the policy's folder.")
    budget: Budget = Field(description="Caps on the privacy loss.")
    plans: AllowedPlans = Field(description="Plans that are allowed.")
    peers: Peers = Field(default=Peers(), description="Owners that this owner knows.")

    @model_validator(mode="after")
    def _worst(self) -> Self:
        if self.plans.allow_distributed_noise and self.budget.epsilon_worst is None:
            raise ValueError("plans.allow_distributed_noise needs budget.epsilon_worst")
        return self

    @classmethod
    def from_toml(cls, text: str) -> Policy:
        """Parse and validate the text of a policy.toml.

        Raises:
            PolicyInvalid: Names the first wrong field and why.
        """
        try:
            fields = toml_fields(text)
        except ValueError as error:
            raise PolicyInvalid(f"not TOML: {error}") from None
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise PolicyInvalid(first_problem(error)) from None


def admit(policy: Policy, plan: Plan) -> None:
    """Check that a plan by itself is within the policy; what earlier runs spent is the ledger's affair.

    Raises:
        PolicyRefused: Names the policy's field and the plan's value.
        PlanInvalid: The plan has noise but its multiplier is not filled in.
    """
    plans, budget = policy.plans, policy.budget
    if plan.task.name not in plans.tasks:
        raise PolicyRefused(f"plans.tasks does not hold {plan.task.name!r}")
    if plan.model.name not in plans.models:
        raise PolicyRefused(f"plans.models does not hold {plan.model.name!r}")
    if plan.cohort.minimum < plans.min_cohort:
        raise PolicyRefused(
            f"plans.min_cohort is {plans.min_cohort}, the plan's cohort.minimum is {plan.cohort.minimum}"
        )
    if any(weight < plans.min_weight for weight in plan.cohort.weights.values()):
        raise PolicyRefused(f"plans.min_weight is {plans.min_weight:g}, a weight of the plan is below it")
    if plan.encryption.preset == "ckks" and not plans.allow_ckks:
        raise PolicyRefused("plans.allow_ckks is false, the plan's encryption.preset is 'ckks'")
    if plan.encryption.frames == "seal" and not plans.allow_seal_frames:
        raise PolicyRefused("plans.allow_seal_frames is false, the plan's encryption.frames is 'seal'")
    if plan.encryption.quorum < policy.peers.min_known_peers:
        raise PolicyRefused(
            f"peers.min_known_peers is {policy.peers.min_known_peers}, the plan's encryption.quorum is "
            f"{plan.encryption.quorum}: fewer owners could invent a sum"
        )
    if plan.privacy.unit not in plans.units:
        raise PolicyRefused(f"plans.units does not hold {plan.privacy.unit!r}")
    if plan.privacy.noise == "distributed":
        _admit_shares(policy, plan)
    epsilon = planned_epsilon(plan)
    if epsilon is None:
        if not plans.allow_no_privacy:
            raise PolicyRefused("plans.allow_no_privacy is false, the plan's privacy.noise is 'none'")
        return
    if not epsilon <= budget.epsilon_per_run:
        raise PolicyRefused(
            f"budget.epsilon_per_run is {budget.epsilon_per_run:g}, the plan's epsilon is {epsilon:.4f}"
        )
    _, delta = promised_loss(plan)
    if delta > budget.delta_total:
        raise PolicyRefused(f"budget.delta_total is {budget.delta_total:g}, the plan's delta is {delta:g}")


def _admit_shares(policy: Policy, plan: Plan) -> None:
    """Check what distributed noise rests on: consent, known peers, and the loss if all others collude."""
    if not policy.plans.allow_distributed_noise:
        raise PolicyRefused(
            "plans.allow_distributed_noise is false, the plan's privacy.noise is 'distributed'"
        )
    colluders, known = plan.privacy.tolerated_colluders, policy.peers.min_known_peers
    if known < colluders + 1:
        raise PolicyRefused(
            f"peers.min_known_peers is {known}, the plan's privacy.tolerated_colluders is {colluders}: at "
            "least one more must be known"
        )
    worst, cap = planned_worst_epsilon(plan), policy.budget.epsilon_worst
    if worst is None or cap is None or not worst <= cap:
        raise PolicyRefused(
            f"budget.epsilon_worst is {cap or 0.0:g}, the plan's epsilon is {worst or 0.0:.4f} if all "
            "others collude"
        )
