"""The run plan: the one contract that coordinator and owners agree on.

A plan is written as TOML, validated here, and *resolved*: calibrated noise and the hash of the initial
model are filled in. The canonical JSON of the resolved plan is hashed; the hash stands in every
signature of the run. Every constant in a plan is public and chosen without looking at private data.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.encoding import Digest, digest
from protocol.errors import PlanInvalid

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all plan sections: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunSection(Section):
    """Name and length of the run."""

    name: Name = Field(description="Name of the run, used for its folder.")
    rounds: int = Field(ge=1, le=100_000, description="Rounds that must finish.")
    paid_spares: int = Field(
        default=1,
        ge=0,
        le=10_000,
        description="Rounds beyond `rounds` that the noise pays for: an attempt that is void after it was "
        "sealed costs privacy like any other.",
    )
    spare_attempts: int = Field(
        default=5, ge=0, le=10_000, description="Attempts beyond `rounds` that void rounds may use up."
    )


class TaskSection(Section):
    """What is learned, in public terms."""

    name: Name = Field(description="Task of the registry, for example `image-classification`.")
    input_shape: list[Annotated[int, Field(ge=1, le=100_000)]] = Field(
        min_length=1, max_length=4, description="Shape of one example, for example [8, 8]."
    )
    value_range: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default=[0.0, 1.0], min_length=2, max_length=2, description="Declared range of raw values."
    )
    classes: int = Field(ge=2, le=100_000, description="Number of classes.")

    @model_validator(mode="after")
    def _ordered_range(self) -> Self:
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError("task.value_range must be [low, high] with low < high")
        return self


class ModelSection(Section):
    """Architecture and round 0's weights."""

    name: Name = Field(description="Model of the registry: `linear` or `mlp`.")
    hidden: list[Annotated[int, Field(ge=1, le=65_536)]] = Field(
        default=[], max_length=8, description="Widths of the hidden layers of `mlp`."
    )
    initial_seed: int = Field(default=0, ge=0, lt=2**32, description="Public seed of the first weights.")
    initial_sha256: Digest | None = Field(
        default=None, description="Hash of round 0's model; filled in when the plan is resolved."
    )


class CohortSection(Section):
    """How many owners take part."""

    minimum: int = Field(ge=1, le=1024, description="Fewest owners that a round may have.")
    maximum: int = Field(ge=1, le=1024, description="Most owners; encryption capacity is proved for it.")
    weights: dict[Digest, Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]] = Field(
        default={},
        description="Public weights by fingerprint, for owners that shall count less than 1. Never derive "
        "them from private record counts.",
    )
    corrupted_share: float = Field(
        default=1 / 3,
        ge=1 / 3,
        lt=1,
        description="Share of a list above 64 owners that may collude; decides how many peers mask.",
    )
    allow_small: bool = Field(
        default=False,
        description="Accept a minimum below 3. With two owners each sees the other's exact update.",
    )

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.maximum < self.minimum:
            raise ValueError("cohort.maximum must not be below cohort.minimum")
        if self.minimum < 3 and not self.allow_small:
            raise ValueError("cohort.minimum below 3 needs cohort.allow_small = true")
        return self


class DeadlineSection(Section):
    """The named time limits of a run, in seconds."""

    join_s: Seconds = Field(default=60.0, description="Wait for owners to join.")
    fit_s: Seconds = Field(default=120.0, description="Wait for local training.")
    seal_s: Seconds = Field(default=60.0, description="Wait for encrypted updates.")
    open_s: Seconds = Field(default=60.0, description="Wait for opened sums.")


class TrainingSection(Section):
    """Constants of local training; all public."""

    local_steps: int = Field(ge=1, le=100_000, description="DP-SGD steps of an owner in one round.")
    learning_rate: float = Field(gt=0, le=1e4, description="Step size of local DP-SGD.")


class ServerOptimizerSection(Section):
    """How the mean update changes the model; every owner recomputes it."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = Field(
        default="fedavg", description="Reddi et al. 2021, 'Adaptive Federated Optimization'."
    )
    learning_rate: Positive = Field(default=1.0, description="Server step size.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="fedavgm's momentum; Adam's beta 1.")
    second_moment: float = Field(default=0.99, ge=0, lt=1, description="Adam's and Yogi's beta 2.")
    epsilon: Positive = Field(default=1e-3, description="Adam's and Yogi's tau.")


class PrivacySection(Section):
    """Differential privacy of the run. Adjacency is add/remove of one unit."""

    unit: Literal["example"] = Field(
        default="example", description="What one guarantee covers: one record of one owner."
    )
    noise: Literal["local", "none"] = Field(
        default="local",
        description="`local`: each owner adds all the noise itself. `none`: no privacy guarantee.",
    )
    target_epsilon: Positive | None = Field(default=None, description="Budget of the whole run.")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="Failure probability.")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="L2 clipping norm of one example.")
    sample_rate: float = Field(gt=0, le=1, description="Poisson sampling probability of one example.")
    expected_batch_size: float = Field(
        ge=1e-3,
        le=1e12,
        description="Public divisor of the noisy gradient sum; never the owner's record count.",
    )
    noise_multiplier: Positive | None = Field(
        default=None, description="Noise deviation over max_grad_norm; calibrated when left out."
    )

    @model_validator(mode="after")
    def _target(self) -> Self:
        if self.noise == "local" and self.target_epsilon is None:
            raise ValueError("privacy.target_epsilon is required unless privacy.noise is 'none'")
        if self.noise == "none" and (self.target_epsilon or self.noise_multiplier):
            raise ValueError(
                "privacy.noise = 'none' gives no guarantee: remove target_epsilon and noise_multiplier"
            )
        return self


class EncryptionSection(Section):
    """Homomorphic encryption of the updates."""

    preset: Literal["exact16", "compact", "fine", "wide", "ckks"] = Field(
        default="exact16", description="Parameter set; see docs/encryption.md."
    )
    quorum: int = Field(default=2, ge=1, le=1024, description="Owners whose opened sums must agree.")
    update_range: float | None = Field(
        default=None,
        ge=1e-9,
        le=1e9,
        description="Largest magnitude of one update value; derived from public constants if left out.",
    )


class CompressionSection(Section):
    """How the finished model is made small."""

    prune_ratio: float = Field(default=0.5, ge=0, lt=1, description="Share of hidden units to remove.")
    quantize: Literal["int8", "none"] = Field(default="int8", description="Weight and activation type.")
    max_accuracy_drop: float = Field(
        default=0.01, ge=0, le=1, description="Largest accepted loss of accuracy on public data."
    )


class Plan(Section):
    """A whole run plan.

    Call `Plan.from_toml` for a file and `resolved` before the plan is hashed or sent.
    """

    version: int = Field(default=1, ge=1, le=1, description="Version of this format.")
    run: RunSection
    task: TaskSection
    model: ModelSection
    cohort: CohortSection
    deadlines: DeadlineSection = DeadlineSection()
    training: TrainingSection
    server_optimizer: ServerOptimizerSection = ServerOptimizerSection()
    privacy: PrivacySection
    encryption: EncryptionSection = EncryptionSection()
    compression: CompressionSection = CompressionSection()

    @model_validator(mode="after")
    def _quorum(self) -> Self:
        if self.encryption.quorum > self.cohort.minimum:
            raise ValueError("encryption.quorum must not be above cohort.minimum")
        return self

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Parse and validate the text of a plan.toml.

        Raises:
            PlanInvalid: Names the first wrong field and why.
        """
        try:
            return cls.from_fields(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise PlanInvalid(f"not TOML: {error}") from None

    @classmethod
    def from_fields(cls, fields: Any) -> Plan:
        """Validate a plan given as nested dicts, as TOML or canonical JSON parse to."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise PlanInvalid(first_problem(error)) from None

    def fields(self) -> dict[str, Any]:
        """Return the plan as nested dicts with every default written out."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Return the plan hash: SHA-256 of the canonical JSON of all fields."""
        return digest(self.fields())

    @property
    def max_attempts(self) -> int:
        """Most attempts that a run may make, finished and void ones together."""
        return self.run.rounds + self.run.spare_attempts

    @property
    def paid_rounds(self) -> int:
        """Sealed attempts that the noise pays for, void ones included."""
        return self.run.rounds + self.run.paid_spares

    @property
    def total_steps(self) -> int:
        """DP-SGD steps of one owner over all sealed attempts that the noise pays for."""
        return self.paid_rounds * self.training.local_steps

    def total_weight(self, owners: Sequence[str]) -> float:
        """Return the sum of the public weights of these owners, added up in ascending order.

        Args:
            owners: Fingerprints of the contributors.
        """
        return math.fsum(self.cohort.weights.get(owner, 1.0) for owner in sorted(owners))

    @property
    def update_range(self) -> float:
        """Public range R of one update value; beyond it values are clamped.

        Unless the plan names it: a step moves a value by at most the step size times the clipped sum
        over the expected batch size, and twice the expected batch is allowed for; the noise adds eight
        of its standard deviations over all steps. Clamping costs accuracy and never privacy.
        """
        if self.encryption.update_range is not None:
            return self.encryption.update_range
        privacy, steps = self.privacy, self.training.local_steps
        signal = 2.0 * steps
        noise = 8.0 * (privacy.noise_multiplier or 0.0) * math.sqrt(steps) / privacy.expected_batch_size
        return self.training.learning_rate * privacy.max_grad_norm * (signal + noise)


def first_problem(error: ValidationError) -> str:
    """Return 'field: reason' of the first problem, without echoing the offending value."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {reason}" if field else reason
