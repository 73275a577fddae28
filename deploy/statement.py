"""The privacy statement that a model package carries: what the model reveals, under which constants."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from protocol.claims import Adjacency, Unit, adjacency, assumption
from protocol.messages import Message
from protocol.plan import Plan
from protocol.sections import Positive

PLAN_CONSTANTS = (
    "unit",
    "noise",
    "noise_multiplier",
    "max_grad_norm",
    "max_update_norm",
    "sample_rate",
)
"""Fields that a statement takes from the plan's privacy section as they are."""


class PrivacyStatement(Message):
    """What the trained model reveals about one unit, and under which constants.

    `epsilon` and `delta` are the largest over all owners. `epsilon_worst` holds even if all other owners
    collude, `epsilon` under `assumption`. What follows training sees no private data and
    so adds nothing (post-processing: Dwork & Roth 2014, proposition 2.1).
    """

    unit: Unit
    adjacency: Adjacency
    noise: Literal["local", "distributed", "none"]
    assumption: Annotated[str, Field(min_length=1, max_length=1000)]
    epsilon: Positive | None
    epsilon_worst: Positive | None
    delta: Annotated[float, Field(gt=0, lt=1)] | None
    accountant: str | None
    noise_multiplier: Positive | None
    max_grad_norm: Positive
    max_update_norm: Positive | None
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    rounds: Annotated[int, Field(ge=1)]
    local_steps: Annotated[int, Field(ge=1)]
    statement: Annotated[str, Field(min_length=1, max_length=4000)]
    private_data_after_training: Literal["nothing"]

    @model_validator(mode="after")
    def _noise_and_loss_agree(self) -> Self:
        loss = (self.epsilon, self.epsilon_worst, self.delta, self.accountant, self.noise_multiplier)
        if any((value is None) != (self.noise == "none") for value in loss):
            raise ValueError("both epsilons, delta, accountant and noise_multiplier stand with noise only")
        return self

    @classmethod
    def for_plan(
        cls,
        plan: Plan,
        epsilon: float | None,
        epsilon_worst: float | None,
        delta: float | None,
        accountant: str | None,
    ) -> PrivacyStatement:
        """Make the statement of a finished run.

        Args:
            plan: The resolved plan of the run. Without noise, the other four are None.
            epsilon: Largest privacy loss over all owners.
            epsilon_worst: The same if all other owners collude.
            delta: The delta that belongs to it.
            accountant: How the loss was computed, for example ``PLD``.

        Raises:
            EncodingInvalid: A loss is given without noise, or missing with noise.
        """
        constants = {name: getattr(plan.privacy, name) for name in PLAN_CONSTANTS}
        return cls.from_fields(
            {
                **constants,
                "adjacency": adjacency(plan),
                "assumption": assumption(plan),
                "epsilon": epsilon,
                "epsilon_worst": epsilon_worst,
                "delta": delta,
                "accountant": accountant,
                "rounds": plan.run.rounds,
                "local_steps": plan.training.local_steps,
                "statement": _in_words(plan, epsilon, epsilon_worst, delta),
                "private_data_after_training": "nothing",
            }
        )


def _in_words(plan: Plan, epsilon: float | None, epsilon_worst: float | None, delta: float | None) -> str:
    if epsilon is None or epsilon_worst is None or delta is None:
        return "This model was trained WITHOUT differential privacy: what it reveals has no bound."
    exposed = "A person with several records, or with records at several owners, is exposed once for each."
    change = "Adding or removing one record of one owner"
    if plan.privacy.unit == "client":
        change = "Replacing everything that one owner contributes by zeros"
        exposed = "A person with records at several owners is exposed once for each of these owners."
    return (
        f"{change} changes the probability of any result of training by at most a factor of "
        f"e^{epsilon:.4g}, except with probability {delta:.3g}. This is the owner with the largest loss; "
        f"all others lose no more. {assumption(plan)} If all collude, epsilon is {epsilon_worst:.4g}. "
        f"{exposed}"
    )
