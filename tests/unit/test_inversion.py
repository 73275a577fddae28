"""Gradient inversion: its measures against other formulas; what gives records away, and what does not."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from audit.evidence.experiments import InversionAttack
from audit.laboratory import inversion, observations, pictures
from protocol.errors import PlanInvalid
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from tasks.images import Examples
from tasks.inputs import input_form
from tasks.partition import digits
from tasks.registry import task_for
from tasks.resolve import resolve

DIGITS = Path(__file__).parents[2] / "scenarios" / "plans" / "digits.toml"
RNG = np.random.default_rng(0)


def digits_plan(**sections: dict[str, object]) -> Plan:
    fields = Plan.from_toml(DIGITS.read_text(encoding="utf-8")).fields()
    for name, values in sections.items():
        fields[name] |= values
    return resolve(Plan.from_fields(fields))


PLAN = digits_plan()


def rows_for(plan: Plan, count: int = 400) -> Examples:
    (rows,), _ = digits(0, 1)
    x = rows[0][:count].reshape(count, *plan.task.input_shape)
    return task_for(plan).check(x, rows[1][:count])


@pytest.fixture(scope="module")
def found() -> list[InversionAttack]:
    state = torch.random.get_rng_state()
    attacks = inversion.attack_gradients(PLAN, rows_for(PLAN), "quick", lambda _line: None)
    assert torch.equal(torch.random.get_rng_state(), state)
    return attacks


def decoded(text: str) -> np.ndarray:
    """Read a grey PNG file of 8 bits without filters, as its specification says (RFC 2083)."""
    data = base64.b64decode(text, validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    parts, rest = {}, data[8:]
    while rest:
        (size,), kind = struct.unpack(">I", rest[:4]), rest[4:8]
        assert struct.unpack(">I", rest[8 + size : 12 + size]) == (zlib.crc32(rest[4 : 8 + size]),)
        parts[kind], rest = rest[8 : 8 + size], rest[12 + size :]
    width, height, *form = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert form == [8, 0, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_plain_updates_give_records_away(found: list[InversionAttack]) -> None:
    plain = [each for each in found if each.observed == "plain update"]
    assert {each.attack for each in plain} == {"analytic", "optimization", "imprint"}
    for attack in plain:
        assert attack.psnr_db is not None
        assert attack.psnr_db >= 40
        assert attack.rebuilt >= max(1, attack.batch // 2)
        assert attack.ssim == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("observed", ["private update", "received by the coordinator"])
def test_protected_updates_do_not(found: list[InversionAttack], observed: str) -> None:
    protected = [each for each in found if each.observed == observed]
    assert {each.attack for each in protected} == {"analytic", "optimization", "imprint"}
    for attack in protected:
        assert attack.psnr_db is not None
        assert attack.psnr_db <= 12
        assert attack.rebuilt == 0
        assert attack.rebuilt_png != attack.original_png


def test_pictures_are_small_and_readable(found: list[InversionAttack]) -> None:
    for attack in found:
        for text in (attack.original_png, attack.rebuilt_png):
            assert len(text) < 10_000
            assert decoded(text).shape == (64, 64)


def test_a_forgotten_noise_is_seen() -> None:
    """Clipping alone protects nobody: what the private update is worth comes from its noise."""
    quiet = PLAN.model_copy(update={"privacy": PLAN.privacy.model_copy(update={"noise_multiplier": 1e-6})})
    task, victim = task_for(PLAN), rows_for(PLAN, 1)
    model, row = task.build_model(PLAN), victim.x[0].astype(float)
    for plan, is_rebuilt in ((quiet, True), (PLAN, False)):
        update = observations.private(task, plan, task.initial_weights(plan), victim)
        rebuilt = pictures.brightness(inversion.row_ratios(model, -update)[0], row)
        ratio = float(pictures.psnr_db(rebuilt, pictures.brightness(row, row)))
        assert pictures.is_recognizable(ratio, pictures.brightness(row, row)) == is_rebuilt


def test_a_plan_without_noise_gives_records_away_like_the_control() -> None:
    bare = {"noise": "none", "target_epsilon": None, "noise_multiplier": None}
    plan = digits_plan(privacy=bare)
    task, victim = task_for(plan), rows_for(plan, 1)
    weights = task.initial_weights(plan)
    private = observations.private(task, plan, weights, victim)
    assert np.array_equal(private, observations.plain(task, plan, weights, victim))


@pytest.mark.parametrize("encryption", [{}, {"preset": "ckks"}, {"frames": "seal"}])
def test_what_the_coordinator_receives_says_nothing_of_the_update(encryption: dict[str, object]) -> None:
    plan = digits_plan(encryption=encryption)
    update = np.sign(RNG.normal(size=9000)) * observations.single_step(plan).update_range * 0.9
    first, second = (observations.received(plan, update) for _ in range(2))
    assert first.shape == update.shape
    for a, b in ((first, update), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 6 / math.sqrt(update.size)


def test_the_attacked_step_is_the_gradient_itself() -> None:
    task, victims = task_for(PLAN), rows_for(PLAN, 3)
    model = task.build_model(PLAN)
    task.loss(model(torch.from_numpy(victims.x)), torch.from_numpy(victims.y)).sum().backward()
    gradient = np.concatenate([value.grad.numpy().ravel() for value in model.parameters()])
    update = observations.plain(task, PLAN, task.initial_weights(PLAN), victims)
    assert -update == pytest.approx(gradient, abs=1e-6)


def test_an_owner_builds_another_model_than_the_malicious_one() -> None:
    """An owner joins only if its own code's model has the plan's hash; see `client.joining.check_plan`."""
    malicious = inversion.imprint_task(PLAN, rows_for(PLAN).x)
    hashes = [
        GlobalModel.initial(task.initial_weights(PLAN)).sha256() for task in (task_for(PLAN), malicious)
    ]
    assert hashes[0] == PLAN.model.initial_sha256 != hashes[1]
    with pytest.raises(PlanInvalid):
        input_form("imprint", PLAN.task)


def test_records_that_are_no_pictures_are_compared_without_pictures() -> None:
    plan = digits_plan(task={"input_shape": [64]}, model={"name": "linear", "hidden": []})
    found = inversion.attack_gradients(plan, rows_for(plan, 40), "quick", lambda _line: None)
    assert len(found) == 9
    for attack in found:
        assert attack.original_png == attack.rebuilt_png == ""
        assert attack.ssim is None
        assert (attack.rebuilt > 0) == (attack.observed == "plain update")


def test_fewer_records_than_a_batch_or_none_are_no_error() -> None:
    nobody = inversion.attack_gradients(PLAN, rows_for(PLAN, 0), "quick", lambda _line: None)
    assert nobody == []
    few = inversion.imprint_task(PLAN, rows_for(PLAN, 1).x)
    assert np.all(np.isfinite(few.thresholds))


def test_a_convolution_has_no_analytic_attack() -> None:
    plan = digits_plan(task={"input_shape": [16, 16]}, model={"name": "cnn", "hidden": []})
    assert not inversion.starts_linear(task_for(plan).build_model(plan))
    assert inversion.starts_linear(task_for(PLAN).build_model(PLAN))
    assert not inversion.starts_linear(torch.nn.Linear(3, 2, bias=False))


@pytest.mark.long
def test_a_convolutional_network_is_attacked_too() -> None:
    (rows,), _ = digits(0, 1)
    plan = digits_plan(task={"input_shape": [16, 16]}, model={"name": "cnn", "hidden": []})
    large = rows[0][:200].repeat(2, axis=1).repeat(2, axis=2)
    public = task_for(plan).check(large, rows[1][:200])
    found = inversion.attack_gradients(plan, public, "quick", lambda _line: None)
    assert {each.attack for each in found} == {"optimization", "imprint"}
    assert all(each.rebuilt == 0 for each in found if each.observed != "plain update")


def test_psnr_is_the_logarithm_of_the_squared_error() -> None:
    picture, noisy = RNG.random(64), RNG.random((5, 64))
    errors = [sum((each[i] - picture[i]) ** 2 for i in range(64)) / 64 for each in noisy]
    expected = [10 * math.log10(1 / error) for error in errors]
    assert pictures.psnr_db(noisy, picture) == pytest.approx(expected)
    assert pictures.psnr_db(picture, picture) == 120.0


def test_ssim_is_that_of_every_window() -> None:
    a, b = RNG.random((9, 11)), RNG.random((9, 11))
    values = []
    for i in range(3):
        for j in range(5):
            p, q = a[i : i + 7, j : j + 7].ravel(), b[i : i + 7, j : j + 7].ravel()
            light = (2 * p.mean() * q.mean() + 1e-4) / (p.mean() ** 2 + q.mean() ** 2 + 1e-4)
            shape = np.cov(p, q)
            values.append(light * (2 * shape[0, 1] + 9e-4) / (shape[0, 0] + shape[1, 1] + 9e-4))
    assert pictures.ssim(a, b) == pytest.approx(np.mean(values))
    assert pictures.ssim(a, a) == pytest.approx(1.0)


def test_a_guess_without_knowledge_never_counts_as_rebuilt() -> None:
    """Almost black pictures and features with rare large values are near to any even guess."""
    dark = np.zeros(784)
    dark[:4] = 1.0
    even = np.full(784, dark.mean())
    ratio = float(pictures.psnr_db(even, dark))
    assert ratio > 20
    assert not pictures.is_recognizable(ratio, dark)
    assert pictures.is_recognizable(120.0, dark)
    features = RNG.normal(size=1000) ** 5
    scaled = pictures.deviations(features, features)
    guess = pictures.deviations(np.full(1000, features.mean()), features)
    assert float(pictures.psnr_db(guess, scaled)) == pytest.approx(0.0, abs=1e-9)


def test_a_png_file_holds_the_picture_enlarged() -> None:
    picture = RNG.random((8, 8))
    assert np.array_equal(decoded(pictures.png(picture))[::8, ::8], np.round(picture * 255))
    assert decoded(pictures.png(RNG.random((28, 20)))).shape == (56, 40)
    assert decoded(pictures.png(RNG.random((100, 30)))).shape == (100, 30)
