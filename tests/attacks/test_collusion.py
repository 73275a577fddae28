"""A coordinator and bought owners put together all they hold: frames, the encryption key, their masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hostile import HostileFederation, HostileRun, slots_of
from numpy.typing import NDArray
from scipy import stats

from client import contribution
from crypto.graph import graph_seed, neighbours
from crypto.masks import MaskContext, Masks, advance, apply_masks, mask_stream
from protocol.encoding import digest
from protocol.errors import PlanInvalid
from protocol.messages import Header
from protocol.plan import Plan

VICTIM, PEER, EVIL = 3, 2, 1
UNLIKELY = 1e-7
"""A sound protocol fails one of these tests once in ten million runs."""
ATTEMPTS = 4


def uniformity(values: NDArray[np.uint64], modulus: int, bins: int = 128) -> float:
    """Return the chi-square p-value of `values` being uniform in [0, modulus)."""
    places = np.floor(values.astype(np.float64) / modulus * bins).astype(int)
    return float(stats.chisquare(np.bincount(places, minlength=bins)).pvalue)


@pytest.fixture(scope="module")
def colluders(federation: HostileFederation, plan: Plan) -> Any:
    """Decrypted slots of all owners over several attempts whose updates are all zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contribution, "local_update", lambda *_: np.zeros(650))
        run = federation.run(plan).established()
        chains = {index: run.state(index).chain_keys for index in run.indices}
        key, slots, headers = run.bfv_key(EVIL), [], []
        for attempt in range(1, ATTEMPTS + 1):
            _, sealed = run.sealed_attempt(attempt)
            slots.append({index: slots_of(run, one.frames, key)[0] for index, one in sealed.items()})
            headers.append(Header.from_fields(sealed[VICTIM].header.body))
    return run, chains, slots, headers


def test_the_key_alone_shows_uniform_noise_of_a_victim(colluders: Any) -> None:
    run, _, slots, _ = colluders
    modulus = run.packing().plain_modulus
    seen = np.concatenate([attempt[VICTIM] for attempt in slots])
    assert uniformity(seen, modulus) > UNLIKELY
    # Check slots and padding, whose contents everybody knows, are masked as well.
    assert uniformity(np.concatenate([attempt[VICTIM][330:] for attempt in slots]), modulus) > UNLIKELY
    assert len(np.unique(seen)) > 0.999 * seen.size


def test_all_other_frames_together_do_not_show_their_sum(colluders: Any) -> None:
    run, _, slots, _ = colluders
    modulus = run.packing().plain_modulus
    for left_out in run.indices:
        others = [
            sum(attempt[index].astype(object) for index in run.indices if index != left_out) % modulus
            for attempt in slots
        ]
        joined = np.concatenate(others).astype(np.uint64)
        assert uniformity(joined, modulus) > UNLIKELY
        assert not np.any(joined.reshape(len(slots), -1)[:, -4:] == len(run.indices) - 1)


def test_the_sum_of_all_frames_is_the_sum_and_nothing_else(colluders: Any) -> None:
    run, _, slots, _ = colluders
    modulus = run.packing().plain_modulus
    for attempt in slots:
        total = sum(values.astype(object) for values in attempt.values()) % modulus
        assert list(total[-4:]) == [len(run.indices)] * 4
        assert not np.any(total[650:-4])


def context_of(header: Header, modulus: int) -> MaskContext:
    return MaskContext(
        header.session,
        header.attempt,
        header.purpose,
        header.list_hash,
        header.model_hash,
        modulus,
    )


def without_masks_of(colluders: Any, peers: list[int]) -> NDArray[np.uint64]:
    """Take the masks that the bought owners share with the victim off the victim's slots."""
    run, chains, slots, headers = colluders
    modulus, stripped = run.packing().plain_modulus, []
    for attempt, header in zip(slots, headers, strict=True):
        known = {run.print_(peer): chains[VICTIM][run.print_(peer)] for peer in peers}
        ratcheted = {name: advance(chain, header.attempt) for name, chain in known.items()}
        zero = np.zeros(4096, dtype=np.uint64)
        masks = apply_masks(zero, run.print_(VICTIM), ratcheted, context_of(header, modulus))
        stripped.append((attempt[VICTIM] + np.uint64(modulus) - masks) % np.uint64(modulus))
    return np.concatenate(stripped)


def test_one_honest_peer_is_enough(colluders: Any) -> None:
    modulus = colluders[0].packing().plain_modulus
    assert uniformity(without_masks_of(colluders, [0, EVIL]), modulus) > UNLIKELY
    assert uniformity(without_masks_of(colluders, [EVIL, PEER]), modulus) > UNLIKELY


def test_without_an_honest_peer_the_victim_is_read(colluders: Any) -> None:
    """The tests above would notice: with all other owners bought, nothing is left of the masks."""
    opened = without_masks_of(colluders, [0, EVIL, PEER]).reshape(ATTEMPTS, 4096)
    assert np.all(opened[:, -4:] == 1)
    assert uniformity(opened.reshape(-1), colluders[0].packing().plain_modulus) < UNLIKELY


def test_unmasked_frames_would_be_read_by_any_bought_owner(
    session: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Masks, "apply", lambda _self, slots: slots)
    _, sealed = session.sealed_attempt()
    opened = slots_of(session, sealed[VICTIM].frames, session.bfv_key(EVIL))
    assert np.all(opened[0, -4:] == 1)


def test_masks_of_different_contexts_have_nothing_in_common(colluders: Any) -> None:
    run, chains, _, headers = colluders
    modulus = run.packing().plain_modulus
    context, chain = context_of(headers[0], modulus), chains[VICTIM][run.print_(PEER)]
    base = mask_stream(chain, context, 4096)
    others = [
        mask_stream(advance(chain, 1), context, 4096),
        mask_stream(chain, replace(context, attempt=context.attempt + 1), 4096),
        mask_stream(chain, replace(context, purpose="evaluate"), 4096),
        mask_stream(chain, replace(context, list_hash="ab" * 32), 4096),
        mask_stream(chain, replace(context, model_hash="ab" * 32), 4096),
        mask_stream(chain, replace(context, session="ab" * 32), 4096),
        mask_stream(chains[VICTIM][run.print_(0)], context, 4096),
    ]
    for other in others:
        difference = (base + np.uint64(modulus) - other) % np.uint64(modulus)
        assert np.count_nonzero(base == other) <= 1
        assert uniformity(difference, modulus) > UNLIKELY
        assert abs(np.corrcoef(base.astype(float), other.astype(float))[0, 1]) < 0.12


def test_two_sums_over_lists_of_one_session_share_no_mask(colluders: Any) -> None:
    run, _, slots, _ = colluders
    modulus = run.packing().plain_modulus
    for first in range(ATTEMPTS):
        for second in range(first):
            difference = (slots[first][VICTIM] + np.uint64(modulus) - slots[second][VICTIM]) % np.uint64(
                modulus
            )
            assert uniformity(difference, modulus) > UNLIKELY


def test_masks_of_one_slot_are_uniform_over_many_lists() -> None:
    modulus = 140737488273409
    context = MaskContext("aa" * 32, 1, "train", "bb" * 32, "cc" * 32, modulus)
    drawn = np.array(
        [mask_stream(bytes(32), replace(context, attempt=attempt), 1)[0] for attempt in range(3000)]
    )
    assert uniformity(drawn, modulus, bins=30) > UNLIKELY


def test_a_plan_does_not_put_a_victim_among_bought_neighbours(make_plan: Any) -> None:
    """A tiny `corrupted_share` would leave a few masks per owner, all of them with bought neighbours."""
    with pytest.raises(PlanInvalid, match=r"cohort\.corrupted_share"):
        make_plan(cohort={"corrupted_share": 1e-12, "maximum": 10})
    owners, seed = [digest(place) for place in range(64)], graph_seed([digest("nonce")])
    for own in owners:
        assert neighbours(own, owners, seed, 1, 1e-12) == sorted(set(owners) - {own})
