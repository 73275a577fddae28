"""A bad network at the level of messages, decided by a seed, and what must hold whatever it does.

The grid drops, delays, repeats and reorders requests and replies, and takes nodes off the network for a
while. Owners and coordinator are the real ones, in one process, on one virtual clock.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from numpy.typing import NDArray

import crypto.sealing
from client.owner import Owner
from client.spending import Spent
from protocol.encoding import decode
from protocol.errors import LedgerConflict
from protocol.records import from_record
from scenarios.grid import LocalGrid
from tests.virtual_time import VirtualTime


@dataclass(frozen=True)
class Weather:
    """How bad the network is; each number is a probability for one message.

    Attributes:
        lost: A request never arrives.
        unheard: The owner acts on it, and its reply never arrives.
        repeated: It arrives twice.
        late: It, its twin or the reply arrives after up to `delay_s`, and so behind what was sent later.
        away: The node is off the network for up to `delay_s`, from this request on.
        delay_s: Longest delay, in virtual seconds; deadlines are shorter.
    """

    lost: float
    unheard: float
    repeated: float
    late: float
    away: float
    delay_s: float

    @classmethod
    def of(cls, rng: random.Random) -> Weather:
        """Draw a weather; of requests and replies together up to 30 % are lost."""
        bad = rng.choice((0.05, 0.15, 0.30))
        lost = bad * rng.random()
        others = [bad * rng.random() for _ in range(3)]
        return cls(lost, bad - lost, *others, delay_s=rng.choice((5.0, 60.0, 400.0)))


class Witness:
    """What owners really did, seen from inside them.

    Attributes:
        updates: Quantized values by (node, attempt): what that owner sealed, one array for each call.
        handling: The (node, attempt) whose message is being handled.
    """

    def __init__(self) -> None:
        self.updates: dict[tuple[int, int], list[NDArray[np.uint64]]] = {}
        self.handling = (0, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note every update that is sealed in the block."""
        honest = crypto.sealing.quantize

        def quantize(*arguments: Any) -> NDArray[np.uint64]:
            values = honest(*arguments)
            self.updates.setdefault(self.handling, []).append(values.copy())
            return values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(crypto.sealing, "quantize", quantize)
            yield

    def sealings(self, node: int) -> int:
        """Return how many attempts an owner has begun to seal."""
        return sum(place[0] == node for place in self.updates)


class BadNetwork(LocalGrid):
    """A grid through which messages pass as a seed decides.

    Args:
        inner: Delivers to the owners.
        rng: Decides.
        weather: How bad it is.
        clock: The coordinator's clock.
        owners: The owners by node.
    """

    def __init__(
        self,
        inner: LocalGrid,
        rng: random.Random,
        weather: Weather,
        clock: VirtualTime,
        owners: dict[int, Owner],
    ) -> None:
        self._inner = inner
        self._rng = rng
        self._weather = weather
        self._clock = clock
        self._owners = owners
        self.witness = Witness()
        self._ledger_run = ""
        self.spent: dict[tuple[int, str], list[tuple[Spent, int]]] = {}
        self._away: dict[int, float] = {}
        self._due: list[tuple[float, Message]] = []
        self._coming: list[tuple[float, str, Message, str]] = []
        self.happened: Counter[str] = Counter()

    def comes_late(self, node: int, delay_s: float) -> None:
        """Keep a node away at first; its owner joins between rounds, if the run goes on so long."""
        self._away[node] = self._clock.monotonic() + delay_s

    def get_node_ids(self) -> list[int]:
        now = self._clock.monotonic()
        return [node for node in self._inner.get_node_ids() if self._away.get(node, 0.0) <= now]

    def get_nodes(self) -> list[NodeInfo]:
        # a node that was away connects anew when it is back
        return [
            NodeInfo(node_id=node, last_activated_at=str(self._away.get(node, 0.0)))
            for node in self.get_node_ids()
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            (identifier,) = self._inner.push_messages([message])
            identifiers.append(identifier)
            if identifier:
                self._pass(identifier, message)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._deliver_late()
        wanted, now = set(message_ids), self._clock.monotonic()
        here = [item for item in self._due if item[0] <= now and _answered(item[1]) in wanted]
        self._due = [item for item in self._due if all(item is not one for one in here)]
        replies = [reply for _, reply in here]
        self._rng.shuffle(replies)
        return replies

    def _pass(self, identifier: str, message: Message) -> None:
        weather, node = self._weather, message.metadata.dst_node_id
        if self._is("away", weather.away):
            self._away[node] = self._clock.monotonic() + self._rng.uniform(0.0, weather.delay_s)
        if self._away.get(node, 0.0) > self._clock.monotonic() or self._is("lost", weather.lost):
            return
        if self._is("repeated", weather.repeated):
            twin = Message(message.content, node, message.metadata.message_type)
            (again,) = self._inner.push_messages([twin])
            self._deliver(again, twin, identifier)
        self._deliver(identifier, message, identifier)

    def _deliver(self, delivered: str, message: Message, answered: str) -> None:
        """Let a request arrive now, or later than others that are sent after it."""
        if self._is("late request", self._weather.late):
            due = self._clock.monotonic() + self._rng.uniform(0.0, self._weather.delay_s)
            self._coming.append((due, delivered, message, answered))
        else:
            self._deliver_now(delivered, message, answered)

    def _deliver_late(self) -> None:
        """Let the requests arrive whose time has come, in any order."""
        here = [item for item in self._coming if item[0] <= self._clock.monotonic()]
        self._coming = [item for item in self._coming if all(item is not one for one in here)]
        self._rng.shuffle(here)
        for _, delivered, message, answered in here:
            self._deliver_now(delivered, message, answered)

    def _deliver_now(self, delivered: str, message: Message, answered: str) -> None:
        """Let the owner act on a message; its reply may still get lost."""
        node = message.metadata.dst_node_id
        body = decode(from_record(message.content)[0])
        self.witness.handling = (node, body.get("attempt", 0))
        for reply in self._inner.pull_messages([delivered]):
            reply.metadata.__dict__["_reply_to_message_id"] = answered
            if not self._is("unheard", self._weather.unheard):
                self._schedule(reply)
        self._ledger_run = str(body.get("run", self._ledger_run))
        with suppress(LedgerConflict):
            spent = self._owners[node].ledger.spent(self._ledger_run)
            self.spent.setdefault((node, self._ledger_run), []).append((spent, self.witness.sealings(node)))

    def _schedule(self, reply: Message) -> None:
        late = self._is("late", self._weather.late)
        delay = self._rng.uniform(0.0, self._weather.delay_s) if late else self._rng.uniform(0.0, 0.2)
        self._due.append((self._clock.monotonic() + delay, reply))

    def _is(self, what: str, probability: float) -> bool:
        happens = self._rng.random() < probability
        self.happened[what] += happens
        return happens


def _answered(reply: Message) -> str:
    return str(reply.metadata.reply_to_message_id)
