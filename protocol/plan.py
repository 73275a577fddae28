"""The run plan: the one contract that coordinator and owners agree on.

A plan is written as TOML, validated here, and *resolved*: calibrated noise and the hash of the initial
model are filled in. The canonical JSON of the resolved plan is hashed; the hash stands in every
signature of the run. Every constant in a plan is public and chosen without looking at private data.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from protocol.encoding import digest
from protocol.errors import PlanInvalid
from protocol.sections import (
    CohortSection,
    CompressionSection,
    DeadlineSection,
    EncryptionSection,
    EvaluationSection,
    ModelSection,
    PrivacySection,
    RunSection,
    Section,
    ServerOptimizerSection,
    TaskSection,
    TrainingSection,
)
from protocol.shares import CLAMP_SHARE, LARGEST_PARAMETERS, clamp_deviations, share_deviation


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
    evaluation: EvaluationSection | None = None
    encryption: EncryptionSection = EncryptionSection()
    compression: CompressionSection = CompressionSection()

    @model_validator(mode="after")
    def _quorum(self) -> Self:
        if self.encryption.quorum > self.cohort.minimum:
            raise ValueError("encryption.quorum must not be above cohort.minimum")
        return self

    @model_validator(mode="after")
    def _evaluation(self) -> Self:
        if self.evaluation is None:
            return self
        if self.privacy.unit != "example":
            raise ValueError("evaluation: counts are protected per example, not per client")
        if (self.evaluation.noise == "none") != (self.privacy.noise == "none"):
            raise ValueError("evaluation.noise must be 'none' exactly if privacy.noise is 'none'")
        return self

    @model_validator(mode="after")
    def _shares(self) -> Self:
        """Refuse distributed noise wherever the proof of docs/privacy.md does not hold."""
        privacy = self.privacy
        if privacy.noise != "distributed":
            return self
        if self.cohort.minimum < privacy.tolerated_colluders + 3:
            raise ValueError(
                "privacy.noise = 'distributed' needs cohort.minimum >= privacy.tolerated_colluders + 3"
            )
        if privacy.unit == "example" and self.training.local_steps != 1:
            raise ValueError(
                "privacy.noise = 'distributed' needs training.local_steps = 1 or privacy.unit = 'client'"
            )
        if self.cohort.weights:
            raise ValueError("privacy.noise = 'distributed' needs empty cohort.weights: they shrink shares")
        if self.encryption.preset == "ckks":
            raise ValueError("privacy.noise = 'distributed' needs an exact encryption.preset, not 'ckks'")
        if privacy.noise_multiplier is not None and not self.signal_bound > 0:
            raise ValueError("encryption.update_range is too narrow for the noise: leave it out")
        return self

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Parse and validate the text of a plan.toml.

        Raises:
            PlanInvalid: Names the first wrong field and why.
        """
        try:
            fields = toml_fields(text)
        except ValueError as error:
            raise PlanInvalid(f"not TOML: {error}") from None
        return cls.from_fields(fields)

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
        """Most attempts that a run may make, finished and void ones and evaluations together."""
        return self.run.rounds + self.run.spare_attempts + self.paid_evaluations

    @property
    def paid_rounds(self) -> int:
        """Sealed attempts that the noise pays for, void ones included."""
        return self.run.rounds + self.run.paid_spares

    @property
    def paid_evaluations(self) -> int:
        """Sealed evaluations that the noise pays for, void ones included; 0 without evaluation."""
        if self.evaluation is None:
            return 0
        return -(-self.run.rounds // self.evaluation.every) + self.run.paid_spares

    def is_evaluated(self, finished_round: int) -> bool:
        """Tell whether the model after this finished round is evaluated on the owners' records."""
        if self.evaluation is None or not 1 <= finished_round <= self.run.rounds:
            return False
        return finished_round % self.evaluation.every == 0 or finished_round == self.run.rounds

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
    def sensitivity(self) -> float:
        """Most that one unit changes a release in L2: the clipping norm of an example or an update."""
        return self.privacy.max_update_norm or self.privacy.max_grad_norm

    @property
    def update_scale(self) -> float:
        """Factor from what the noise is added to, a clipped gradient sum or an update, to an update."""
        if self.privacy.unit == "client":
            return 1.0
        return self.training.learning_rate / self.privacy.expected_batch_size

    @property
    def mechanism_delta(self) -> float:
        """Part of delta that the noise is priced at; with distributed noise clamping takes the rest."""
        delta = self.privacy.delta
        return delta * (1.0 - CLAMP_SHARE) if self.privacy.noise == "distributed" else delta

    def noise_deviation(self, owners: int) -> float:
        """Return the deviation of the noise that one owner adds, before `update_scale`.

        Args:
            owners: Length of the round's list; it matters only for distributed noise.
        """
        deviation = (self.privacy.noise_multiplier or 0.0) * self.sensitivity
        if self.privacy.noise != "distributed":
            return deviation
        return share_deviation(deviation, owners, self.privacy.tolerated_colluders)

    @property
    def signal_bound(self) -> float:
        """Public bound of one value without its noise, before `update_scale`.

        A step's sum is at most the clipping norm times the batch, and twice the expected batch is allowed
        for; an update of unit `client` is within its own norm. With distributed noise a named
        `encryption.update_range` lowers it, because the noise must keep its room.
        """
        named = self.encryption.update_range
        if named is not None and self.privacy.noise == "distributed":
            return named / self.update_scale - self._noise_room
        if self.privacy.unit == "client":
            return self.sensitivity
        batch = self.privacy.expected_batch_size
        return 2.0 * self.training.local_steps * batch * self.sensitivity

    @property
    def _noise_room(self) -> float:
        steps = 1 if self.privacy.unit == "client" else self.training.local_steps
        deviations = 8.0
        if self.privacy.noise == "distributed":
            values = LARGEST_PARAMETERS * self.cohort.maximum * self.paid_rounds
            epsilon = self.privacy.target_epsilon or 0.0
            deviations = clamp_deviations(values, self.privacy.delta, epsilon)
        return deviations * self.noise_deviation(self.cohort.minimum) * math.sqrt(steps)

    @property
    def update_range(self) -> float:
        """Public range R of one update value; beyond it values are clamped.

        Unless the plan names it: room for the signal and for eight deviations of the noise over all
        steps. Clamping costs accuracy and never privacy, except with distributed noise, where the room
        is so wide that clamping is paid for by a part of delta.
        """
        if self.encryption.update_range is not None:
            return self.encryption.update_range
        return self.update_scale * (self.signal_bound + self._noise_room)


def toml_fields(text: str) -> dict[str, Any]:
    """Return the fields of a TOML text.

    Raises:
        ValueError: It is no TOML, or is nested too deeply to be read.
    """
    try:
        # some editors put a mark of the encoding before the text
        return tomllib.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def first_problem(error: ValidationError) -> str:
    """Return 'field: reason' of the first problem, without echoing the offending value."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {reason}" if field else reason
