"""The tree over an owner's wraps: what it covers, and that no other wrap passes for a signed one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.agreement import HpkeKey, WrapContext, wrap
from crypto.wraps import WrapTree, require_wrapped, wrap_digests
from protocol.encoding import MAX_BODY_BYTES, digest_bytes
from protocol.errors import ProtocolViolation
from protocol.messages import (
    Join,
    JoinReply,
    KeysRequest,
    LedgerHead,
    RosterReply,
    RosterRequest,
    Signed,
    Stage,
    Start,
    Wraps,
)

DOCS = Path(__file__).parents[2] / "docs"
A, B, C = "a" * 64, "b" * 64, "c" * 64


def names(count: int) -> list[str]:
    return sorted(digest_bytes(f"owner {place}".encode()) for place in range(count))


def tree_of(count: int) -> tuple[WrapTree, dict[str, list[str]]]:
    digests = {name: [digest_bytes(name.encode())] for name in names(count)}
    return WrapTree(digests), digests


def test_digests_cover_seed_and_key_of_each_receiver() -> None:
    digests = wrap_digests({A: b"sa", B: b"sb"}, {A: b"ka", B: b"kb"}, b"dealt")
    assert digests[A] == [digest_bytes(b"sa"), digest_bytes(b"ka"), digest_bytes(b"dealt")]
    assert digests[B] == [digest_bytes(b"sb"), digest_bytes(b"kb"), digest_bytes(b"dealt")]
    assert wrap_digests({A: b"sa"}, {}, None) == {A: [digest_bytes(b"sa")]}


def test_the_root_is_that_of_a_tree_made_by_hand() -> None:
    def hashed(value: object) -> str:
        return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()

    digests = {A: ["1" * 64, "2" * 64], B: ["3" * 64], C: ["4" * 64]}
    leaves = [hashed(["wrap", name, digests[name]]) for name in (A, B, C)]
    expected = hashed(["wraps", hashed(["wraps", leaves[0], leaves[1]]), leaves[2]])
    assert WrapTree(digests).root == expected
    assert WrapTree({C: digests[C], A: digests[A], B: digests[B]}).root == expected
    assert WrapTree(digests).proof(C) == [hashed(["wraps", leaves[0], leaves[1]])]


def test_the_root_is_sensitive_to_each_digest() -> None:
    digests = {A: ["1" * 64, "2" * 64], B: ["3" * 64]}
    changes: list[dict[str, list[str]]] = [
        {**digests, A: ["2" * 64, "1" * 64]},
        {**digests, A: ["1" * 64]},
        {**digests, A: ["1" * 64, "2" * 63 + "0"]},
        {**digests, B: ["3" * 63 + "0"]},
        {**digests, B: []},
        {**digests, C: ["3" * 64]},
        {A: digests[A]},
        {A: digests[A], C: digests[B]},
        {A: digests[B], B: digests[A]},
    ]
    roots = {WrapTree(changed).root for changed in changes}
    assert len(roots) == len(changes)
    assert WrapTree(digests).root not in roots


@given(st.integers(1, 40), st.data())
def test_every_receiver_recognizes_its_own_wraps_and_no_others(count: int, data: st.DataObject) -> None:
    tree, digests = tree_of(count)
    receivers = names(count)
    own = data.draw(st.sampled_from(receivers))
    proof = tree.proof(own)
    assert len(proof) <= (count - 1).bit_length()
    require_wrapped(tree.root, own, receivers, digests[own], proof)
    with pytest.raises(ProtocolViolation):
        require_wrapped(tree.root, own, receivers, [digest_bytes(b"forged")], proof)
    with pytest.raises(ProtocolViolation):
        require_wrapped(tree.root, own, receivers, digests[own], [*proof, A])
    with pytest.raises(ProtocolViolation):
        require_wrapped(digest_bytes(b"another root"), own, receivers, digests[own], proof)
    if proof:
        place = data.draw(st.integers(0, len(proof) - 1))
        changed = [*proof[:place], A, *proof[place + 1 :]]
        for wrong in (changed, proof[:-1], proof[1:]):
            with pytest.raises(ProtocolViolation):
                require_wrapped(tree.root, own, receivers, digests[own], wrong)


@given(st.integers(2, 20), st.data())
def test_one_receivers_wraps_do_not_pass_for_anothers(count: int, data: st.DataObject) -> None:
    tree, digests = tree_of(count)
    own, other = data.draw(st.permutations(names(count)))[:2]
    for proof in (tree.proof(own), tree.proof(other)):
        with pytest.raises(ProtocolViolation):
            require_wrapped(tree.root, own, names(count), digests[other], proof)


def test_an_inner_node_does_not_pass_for_a_leaf() -> None:
    tree, digests = tree_of(4)
    left = WrapTree({name: digests[name] for name in names(4)[:2]}).root
    with pytest.raises(ProtocolViolation):
        require_wrapped(tree.root, names(4)[0], names(4)[:2], [left], tree.proof(names(4)[0])[1:])


def test_what_an_owner_receives_when_it_joins_fits_for_the_largest_cohort() -> None:
    members = names(1024)
    seed = wrap(HpkeKey.generate().public(), bytes(32), WrapContext(A, B, A, B, "pair"))
    body = Wraps(run=A, plan_hash=A, roster_hash=B, nonce=C, wraps_hash=C, key_commitment=None)
    request = KeysRequest(
        run=A,
        wraps=[
            Signed(kind="wraps", body=body.model_dump(mode="json"), signer=name, signature=bytes(64))
            for name in members
        ],
        proofs={name: [A] * 10 for name in members},
        seeds=dict.fromkeys(members, seed),
        key=seed,
        dealt=bytes(60_000),
        heads=[],
    )
    assert len(request.to_bytes()) < MAX_BODY_BYTES
    assert KeysRequest.from_bytes(request.to_bytes()) == request
    alone = request.model_copy(update={"wraps": [], "proofs": {}, "seeds": {}})
    each = (len(request.to_bytes()) - len(alone.to_bytes())) / len(members)
    for page in ("encryption.md", "robustness.md"):
        text = " ".join((DOCS / page).read_text(encoding="utf-8").split())
        assert f"{each / 1000:.1f} kB for each member" in text, page
    # the dealer answers the most: two wraps for each, and each one's message with its newest head
    join = Join(
        version=1,
        run=A,
        plan_hash=A,
        start=Start(
            roster=2**53, round=2**40, model_hash=A, sessions=[Stage(session=A, first_round=2**40)] * 4
        ),
        vouches=False,
        nonce_commitment=C,
        hpke_key=HpkeKey.generate().public(),
        ledger=LedgerHead(sequence=2**40, head=A),
    )
    head = Signed(kind="join", body=join.model_dump(mode="json"), signer=A, signature=bytes(64))
    wraps = dict.fromkeys(members, seed)
    dealer = RosterReply(
        wraps=request.wraps[0],
        seeds=wraps,
        keys=wraps,
        dealt=bytes(60_000),
        heads=dict.fromkeys(members, head),
    )
    assert len(dealer.to_bytes()) < MAX_BODY_BYTES
    reply = JoinReply(certificate=bytes(700), join=head)
    assert len(RosterRequest(run=A, members=[reply] * 1024).to_bytes()) < MAX_BODY_BYTES
    one_hash_more = len(A) + 3
    assert len(alone.to_bytes()) + 1300 * (each + one_hash_more) < MAX_BODY_BYTES
