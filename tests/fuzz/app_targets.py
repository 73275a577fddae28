"""What meets bytes of a peer in a whole process: packages, checkpoints, an owner's app, the coordinator."""

from __future__ import annotations

import logging
import random
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from hostile import HostileFederation

from client.owner import open_owner
from crypto.certificates import fingerprint
from crypto.trust import load_trust
from deploy.measure import CompressionRecord
from deploy.package import PackageParts, verify_package, write_package
from deploy.statement import PrivacyStatement
from protocol.errors import FedsealError
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from protocol.records import from_record, to_record
from scenarios.federation import PolicySettings, make_federation
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.store import RunStore
from tasks.partition import digits
from tests.attacks.conftest import attack_plan
from tests.fuzz.message_targets import spelled
from tests.fuzz.mutations import mutate_bytes, mutate_json
from tests.fuzz.target import Target, require
from tests.fuzz.wire_targets import PLAN, _record
from tests.virtual_time import virtual_time

_CODE = re.compile(r"FS-[A-Z]{1,16}-\d{2}")
_FREE = {"query.join", "train.fit", "query.keys"}
"""Requests of which a part is the coordinator's to choose: a plan, an attempt's number, returned heads."""

_EPSILON = 1e6
_SETTINGS = PolicySettings(epsilon_total=_EPSILON, epsilon_per_run=50.0, delta_total=0.5)


def app_targets() -> list[Target]:
    """Return all targets of this group."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fedseal-fuzz-", dir="/dev/shm"))
    splits, _ = digits(seed=0, owners=4)
    made = make_federation(folder / "federation", [(x[:40], y[:40]) for x, y in splits], _SETTINGS)
    federation = HostileFederation([open_owner(home.folder, home.passphrase) for home in made.owners])
    return [
        _package_target(folder),
        _checkpoint_target(folder),
        _owner_target(federation),
        _coordinator_target(federation, load_trust(made.server_home / "identity"), folder),
    ]


# --- packages and checkpoints ------------------------------------------------------------------------


def _package_target(folder: Path) -> Target:
    key = Ed25519PrivateKey.generate()
    package = folder / "model.fedseal"
    write_package(package, _parts(), key)
    contents = {file.name: file.read_bytes() for file in package.iterdir()}
    copy = folder / "copy.fedseal"
    shutil.copytree(package, copy)

    def make(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(list(contents))
        if name.endswith(".json") and rng.random() < 0.5:
            return name, mutate_json(contents[name], rng, spelled)
        return name, mutate_bytes(contents[name], rng, list(contents.values()))

    def feed(item: tuple[str, bytes]) -> None:
        name, data = item
        (copy / name).write_bytes(data)
        try:
            verify_package(copy, fingerprint(key.public_key()))
        finally:
            (copy / name).write_bytes(contents[name])
        require(data == contents[name], f"a changed {name} verifies")

    return Target("packages", 8, make, feed)


def _parts() -> PackageParts:
    plan = Plan.from_fields(PLAN)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 4])],
    )
    record = {
        "baseline": "none",
        "plan_sha256": plan.sha256(),
        "size_bytes_before": 9,
        "size_bytes_after": 3,
        "size_ratio": 3.0,
        "speed_ratio_b1": 2.0,
        "accuracy_before": 0.9,
        "accuracy_after": 0.9,
        "accuracy_drop": 0.0,
        "max_accuracy_drop": 0.1,
        "public_examples": 10,
        "prune_ratio_asked": 0.5,
        "prune_ratio_used": 0.5,
        "parameter_ratio_removed": 0.5,
        "quantize_asked": "int8",
        "quantize_used": "int8",
        "steps": [{"step": "a", "asked": "b", "reached": "c", "cpu_s": 1.0}],
        "public_data_use": "none",
        "private_data_use": "nothing",
    }
    privacy = PrivacyStatement.for_plan(plan, 2.75, 2.75, 1e-5, "PLD")
    model = onnx.helper.make_model(graph).SerializeToString()
    return PackageParts("fuzzed", model, {"inputs": [1, 2]}, privacy, CompressionRecord.from_fields(record))


def _checkpoint_target(folder: Path) -> Target:
    store = RunStore(folder / "run")
    model = GlobalModel.initial(np.linspace(-1.0, 1.0, 50))
    store.write_checkpoint(3, model)
    (file,) = (folder / "run").glob("checkpoint-*.safetensors")
    content = file.read_bytes()

    def feed(data: bytes) -> None:
        file.write_bytes(data)
        require(store.read_checkpoint(3).sha256() == model.sha256(), "another model is read")

    return Target("checkpoints", 8, lambda rng: mutate_bytes(content, rng), feed)


# --- an owner ----------------------------------------------------------------------------------------


@dataclass
class Expected:
    """A request that an owner would answer next, in a run of its own."""

    kind: str
    body: bytes
    blob: bytes


def _owner_target(federation: HostileFederation) -> Target:
    plan = attack_plan(cohort={"minimum": 3, "maximum": 4})
    expected = _expected(federation, plan)

    def make(rng: random.Random) -> tuple[Expected, bytes, bytes]:
        request = rng.choice(expected)
        body, blob = request.body, request.blob
        if rng.random() < 0.8 or not blob:
            body = mutate_json(body, rng, spelled, [other.body for other in expected])
        else:
            blob = mutate_bytes(blob, rng)
        return request, body, blob

    def feed(item: tuple[Expected, bytes, bytes]) -> None:
        request, body, blob = item
        answered = federation.ask(3, request.kind, body, blob)
        if answered.error is None:
            same = (body, blob) == (request.body, request.blob)
            require(same or request.kind in _FREE, f"a changed {request.kind} is answered")
            return
        _raise_code(answered.error)

    return Target("an owner's app", 8, make, feed)


def _expected(federation: HostileFederation, plan: Plan) -> list[Expected]:
    """Bring runs to every stage, and return for each the request that owner 3 expects there."""
    fresh = federation.run(plan)
    joined = federation.run(plan).join()
    rostered = federation.run(plan).join().roster()
    keyed, ready, sealed, closing = (federation.run(plan).established() for _ in range(4))
    openings, sums = closing.finished_round(1)
    signed = sealed.fit(1)
    frames = sealed.seal(1, signed, sealed.indices)
    opened, blob = sealed.open_request(1, signed, frames)
    from client.following import follow
    from protocol.messages import CloseRequest, JoinRequest, Stage, Start

    model = follow(closing.owner(0), closing.state(0), [openings], sums)[0]
    past = [Stage(session=closing.session, first_round=0)]
    start = Start(roster=2, round=1, model_hash=model.sha256(), sessions=past)
    again = JoinRequest(run=closing.run, plan=plan.fields(), start=start, steps=[openings])
    late = again.model_copy(update={"run": federation.run(plan).run, "steps": []})
    close = CloseRequest(session=closing.session, model_hash="0" * 64, steps=[openings])
    return [
        Expected("query.join", JoinRequest(run=fresh.run, plan=plan.fields()).to_bytes(), b""),
        Expected("query.join", late.to_bytes(), model.to_bytes()),
        Expected("query.roster", joined.roster_request().to_bytes(), b""),
        Expected("query.keys", rostered.keys_request(3).to_bytes(), b""),
        Expected("train.fit", keyed.fit_request(1).to_bytes(), b""),
        Expected("train.fit", closing.fit_request(2, steps=[openings], round_number=2).to_bytes(), sums),
        Expected("train.seal", ready.seal_request(1, ready.fit(1)).to_bytes(), b""),
        Expected("query.open", opened.to_bytes(), blob),
        Expected("query.close", close.to_bytes(), sums),
        Expected("query.join", again.to_bytes(), sums),
    ]


class Refused(FedsealError):
    """Carries the code that an app answered."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code  # type: ignore[misc]


def _raise_code(reason: str) -> None:
    if _CODE.fullmatch(reason) is None or reason == FedsealError.code:
        raise RuntimeError(f"the app answered {reason!r}")
    raise Refused(reason)


# --- the coordinator ---------------------------------------------------------------------------------


@dataclass
class MutatingGrid(LocalGrid):
    """A grid whose nodes answer changed messages now and then."""

    inner: LocalGrid
    rng: random.Random
    share: float
    changed: int = field(default=0)

    def get_node_ids(self) -> list[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        return [self._mutated(reply) for reply in self.inner.pull_messages(message_ids)]

    def _mutated(self, reply: FlowerMessage) -> FlowerMessage:
        if reply.has_error() or self.rng.random() > self.share:
            return reply
        self.changed += 1
        body, blob = from_record(reply.content)
        choice = self.rng.random()
        if choice < 0.6 or (choice < 0.8 and not blob):
            reply.content = to_record(mutate_json(body, self.rng, spelled), blob)
        elif choice < 0.8:
            reply.content = to_record(body, mutate_bytes(blob, self.rng))
        else:
            reply.content = RecordDict() if self.rng.random() < 0.2 else _record(self.rng)
        return reply


def _coordinator_target(federation: HostileFederation, trust: Any, folder: Path) -> Target:
    plan = attack_plan(
        cohort={"minimum": 3, "maximum": 4},
        run={"name": "fuzzed", "rounds": 2, "spare_attempts": 3},
    )

    def make(rng: random.Random) -> random.Random:
        return rng

    def feed(rng: random.Random) -> None:
        store = RunStore(Path(tempfile.mkdtemp(dir=folder)) / "run")
        store.set("plan", plan.fields())
        store.set("plan_hash", plan.sha256())
        federation.run(plan, ())
        grid = MutatingGrid(federation.grid, rng, rng.choice((0.03, 0.1, 0.3)))
        try:
            with virtual_time():
                run_plan(grid, store, trust)
        finally:
            state = store.get("state")
            store.close()
            shutil.rmtree(store.folder.parent)
        require(state == "finished", "a run ended without a state")

    return Target("the coordinator", 1, make, feed)
