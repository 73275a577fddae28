"""The sections of a run plan: every field, its type, its range and its default."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from protocol.encoding import Digest
from protocol.privacy_loss import require_accountant

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(ge=1e-3, le=1e3)]
"""A budget: below it noise drowns every model, above it nothing is protected that a reader could notice."""

Delta = Annotated[float, Field(ge=1e-15, le=0.01)]
"""Floating point resolves no smaller one over a few steps; above it, leaking whole records is allowed."""

NoiseMultiplier = Annotated[float, Field(ge=0.01, le=1e6)]
ClippingNorm = Annotated[float, Field(ge=1e-6, le=1e6)]
"""float32 keeps its digits when gradients are scaled by such a norm, and sums of them stay finite."""

LearningRate = Annotated[float, Field(ge=1e-8, le=1e4)]
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
        min_length=1, max_length=4, description="Shape of one example: [8, 8], or [3, 32, 32] in colour."
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

    name: Name = Field(description="Model of the registry: `linear`, `mlp`, `cnn` or `scattering`.")
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
    pause_s: Seconds = Field(
        default=120.0,
        description="Wait for enough owners to be there before a round; then the run pauses and can be "
        "resumed.",
    )


class TrainingSection(Section):
    """Constants of local training; all public."""

    local_steps: int = Field(ge=1, le=100_000, description="DP-SGD steps of an owner in one round.")
    learning_rate: LearningRate = Field(description="Step size of local DP-SGD.")
    gradient_engine: Literal["auto", "book-keeping", "hooks"] = Field(
        default="auto",
        description="How each example's gradient is clipped. `book-keeping`: one backward pass, for the "
        "common layers. `hooks`: Opacus' own, dearer, for more layers. `auto`: the first that can.",
    )


class ServerOptimizerSection(Section):
    """How the mean update changes the model; every owner recomputes it."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = Field(
        default="fedavg", description="Reddi et al. 2021, 'Adaptive Federated Optimization'."
    )
    learning_rate: LearningRate = Field(default=1.0, description="Server step size.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="fedavgm's momentum; Adam's beta 1.")
    second_moment: float = Field(default=0.99, ge=0, lt=1, description="Adam's and Yogi's beta 2.")
    epsilon: float = Field(default=1e-3, ge=1e-10, le=1e3, description="Adam's and Yogi's tau.")


class PrivacySection(Section):
    """Differential privacy of the run. Adjacency is add/remove of one unit."""

    unit: Literal["example", "client"] = Field(
        default="example",
        description="What one guarantee covers. `example`: one record of one owner. `client`: everything "
        "that one owner contributes.",
    )
    noise: Literal["local", "distributed", "none"] = Field(
        default="local",
        description="`local`: each owner adds all the noise itself. `distributed`, EXPERIMENTAL: the "
        "owners' noise reaches the promise only in the sum. `none`: no privacy guarantee.",
    )
    tolerated_colluders: int = Field(
        default=1,
        ge=1,
        le=1021,
        description="With distributed noise: owners that may tell their noise to another owner.",
    )
    max_update_norm: ClippingNorm | None = Field(
        default=None, description="With unit `client`: L2 clipping norm of an owner's whole update."
    )
    target_epsilon: Epsilon | None = Field(default=None, description="Budget of the whole run.")
    delta: Delta = Field(default=1e-5, description="Failure probability.")
    accountant: Literal["pld"] = Field(
        default="pld", description="How epsilon is counted: by privacy loss distributions."
    )
    max_grad_norm: ClippingNorm = Field(default=1.0, description="L2 clipping norm of one example.")
    sample_rate: float = Field(ge=1e-6, le=1, description="Poisson sampling probability of one example.")
    expected_batch_size: float = Field(
        ge=1e-3,
        le=1e12,
        description="Public divisor of the noisy gradient sum; never the owner's record count.",
    )
    noise_multiplier: NoiseMultiplier | None = Field(
        default=None, description="Noise deviation over max_grad_norm; calibrated when left out."
    )

    @field_validator("accountant", mode="before")
    @classmethod
    def _accountant(cls, name: object) -> object:
        require_accountant(name)
        return name

    @model_validator(mode="after")
    def _unit(self) -> Self:
        if (self.unit == "client") != (self.max_update_norm is not None):
            raise ValueError("privacy.max_update_norm stands exactly with privacy.unit = 'client'")
        if self.unit == "client" and self.noise == "none":
            raise ValueError("privacy.noise = 'none' protects no client: leave privacy.unit out")
        return self

    @model_validator(mode="after")
    def _target(self) -> Self:
        if self.noise != "none" and self.target_epsilon is None:
            raise ValueError("privacy.target_epsilon is required unless privacy.noise is 'none'")
        if self.noise == "none" and (self.target_epsilon or self.noise_multiplier):
            raise ValueError(
                "privacy.noise = 'none' gives no guarantee: remove target_epsilon and noise_multiplier"
            )
        return self


class EvaluationSection(Section):
    """Federated evaluation: noised counts of right and wrong answers on records held out of training."""

    every: int = Field(
        ge=1, le=100_000, description="Rounds between evaluations; the last round is always evaluated."
    )
    holdout_share: float = Field(
        default=0.1,
        ge=0.01,
        le=0.5,
        description="Share of an owner's records that are counted and never trained on; a keyed hash of "
        "each record's content decides.",
    )
    noise: Literal["local", "none"] = Field(
        default="local",
        description="`local`: each owner adds all the noise itself. `none`: with `privacy.noise = 'none'` "
        "only.",
    )
    target_epsilon: Epsilon | None = Field(
        default=None, description="Budget of all evaluations, on top of `privacy.target_epsilon`."
    )
    delta: Delta = Field(default=1e-6, description="Failure probability, on top too.")
    noise_multiplier: NoiseMultiplier | None = Field(
        default=None, description="Noise deviation of each count; calibrated when left out."
    )
    count_range: float = Field(
        default=10_000.0,
        ge=1,
        le=1e9,
        description="Public bound of a noised count, beyond which it is clamped; never derived from an "
        "owner's record count.",
    )

    @model_validator(mode="after")
    def _target(self) -> Self:
        if self.noise == "local" and self.target_epsilon is None:
            raise ValueError("evaluation.target_epsilon is required unless evaluation.noise is 'none'")
        if self.noise == "none" and (self.target_epsilon or self.noise_multiplier):
            raise ValueError(
                "evaluation.noise = 'none' gives no guarantee: remove target_epsilon and noise_multiplier"
            )
        return self


class EncryptionSection(Section):
    """Homomorphic encryption of the updates."""

    preset: Literal["exact16", "compact", "fine", "wide", "ckks"] = Field(
        default="exact16", description="Parameter set; see docs/encryption.md."
    )
    frames: Literal["packed", "seal"] = Field(
        default="packed",
        description="Form of a ciphertext on the wire. `packed`: no byte of a peer reaches SEAL's parser. "
        "`seal`: SEAL's own form, larger, for a library that does not take packed frames; not for `ckks`.",
    )
    quorum: int = Field(default=2, ge=1, le=1024, description="Owners whose opened sums must agree.")
    update_range: float | None = Field(
        default=None,
        ge=1e-9,
        le=1e9,
        description="Largest magnitude of one update value; derived from public constants if left out.",
    )

    @model_validator(mode="after")
    def _masked_residues(self) -> Self:
        if self.preset == "ckks" and self.frames == "seal":
            raise ValueError("encryption.preset = 'ckks' needs encryption.frames = 'packed'")
        return self


class CompressionSection(Section):
    """How the finished model is made small."""

    prune_ratio: float = Field(default=0.5, ge=0, lt=1, description="Share of hidden units to remove.")
    quantize: Literal["int8", "none"] = Field(default="int8", description="Weight and activation type.")
    max_accuracy_drop: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest accepted loss of accuracy on public data; without it, of agreement with "
        "the unpruned model on synthetic inputs.",
    )
