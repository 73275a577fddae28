"""A package says which unit its epsilon is about, what it rests on, and what is left without that."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.statement import PrivacyStatement
from protocol.claims import EXPERIMENTAL
from protocol.errors import EncodingInvalid
from protocol.plan import Plan

CLIENT = {"unit": "client", "max_update_norm": 0.5}


def statement(**privacy: Any) -> PrivacyStatement:
    fixed = {"target_epsilon": 3.0, "noise_multiplier": 4.0, "sample_rate": 0.1, "expected_batch_size": 8.0}
    plan = Plan.from_fields(
        {
            "run": {"name": "stated", "rounds": 3},
            "task": {"name": "image-classification", "input_shape": [4], "classes": 2},
            "model": {"name": "linear"},
            "cohort": {"minimum": 4, "maximum": 6},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "privacy": fixed | privacy,
        }
    )
    return PrivacyStatement.for_plan(plan, 2.5, 7.5, 1e-5, "PLD")


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_a_statement_about_clients_does_not_speak_of_single_records(noise: str) -> None:
    client, example = statement(noise=noise, **CLIENT), statement(noise=noise)
    assert (client.unit, client.adjacency) == ("client", "zero-out")
    assert (example.unit, example.adjacency) == ("example", "add/remove")
    assert "everything that one owner contributes" in client.statement
    assert "one record" in example.statement
    assert "one record" not in client.statement


def test_shared_noise_is_marked_and_has_both_losses_in_words() -> None:
    shared, local = statement(noise="distributed"), statement()
    for text in (shared.statement, shared.assumption):
        assert EXPERIMENTAL in text
    assert "7.5" in shared.statement
    assert EXPERIMENTAL not in local.statement


def test_a_loss_without_the_other_is_refused() -> None:
    fields = statement().model_dump(mode="json")
    with pytest.raises(EncodingInvalid):
        PrivacyStatement.from_fields(fields | {"epsilon_worst": None})
