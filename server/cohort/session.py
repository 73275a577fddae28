"""Establishing a session: the coordinator's side of `query.join`, `query.roster` and `query.keys`."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from crypto.agreement import signed_hash
from crypto.certificates import verify_signing_certificate
from crypto.signing import signed_head, verify
from crypto.trust import Trust
from crypto.wraps import WrapTree, wrap_digests
from protocol.batches import LONGEST_RECONNECT_S
from protocol.encoding import digest, digest_bytes
from protocol.errors import FedsealError, ProtocolViolation, QuorumNotMet
from protocol.messages import (
    Join,
    JoinReply,
    JoinRequest,
    KeysReply,
    KeysRequest,
    RosterReply,
    RosterRequest,
    Session,
    Signed,
    Start,
    Wraps,
)
from protocol.plan import Plan
from server.cohort.members import Member, ServerSession
from server.exchange import Exchanger, Reply, Request
from server.store import RunStore

_LOG = logging.getLogger("fedseal.server")
_POLL_S = 0.1
SETTLE_S = 3.0
"""Seconds without anybody new after which enough owners need not be all owners."""

RETURN_S = LONGEST_RECONNECT_S + 3.0
"""Longest wait between two tries for nodes that were silent: their longest pause, and time to connect."""

TRIES = 3
"""Rosters that are tried one after the other, each without the owners that made the one before fail."""


def node_digest(node: int) -> str:
    """Return a stand-in for the fingerprint of an owner that refused before it named itself."""
    return digest_bytes(f"node {node}".encode())


def wait_for_owners(exchanger: Exchanger, plan: Plan) -> dict[int, str]:
    """Wait until the largest cohort is online, or the smallest one and nobody else comes.

    Raises:
        QuorumNotMet: Fewer than `cohort.minimum` nodes are online at `deadlines.join_s`.
    """
    deadline = time.monotonic() + plan.deadlines.join_s
    nodes, changed = exchanger.online(), time.monotonic()
    while time.monotonic() < deadline:
        current = exchanger.online()
        if current.keys() != nodes.keys():
            nodes, changed = current, time.monotonic()
        settled = time.monotonic() - changed > SETTLE_S
        if len(nodes) >= plan.cohort.maximum or (len(nodes) >= plan.cohort.minimum and settled):
            break
        time.sleep(_POLL_S)
    if len(nodes) < plan.cohort.minimum:
        raise QuorumNotMet(f"{len(nodes)} owners are online, {plan.cohort.minimum} are needed")
    return dict(sorted(nodes.items())[: plan.cohort.maximum])


class Joining:
    """Runs the three joining exchanges for one plan.

    Args:
        exchanger: Sends requests.
        store: Records refusals and owners.
        plan: The resolved plan.
        trust: The federation's authority and its revocation list.

    Attributes:
        failed: Nodes that refused since the last `forget`, with the code.
        silences: Exchanges since then in which a node did not answer; once may be the network's fault.
    """

    def __init__(
        self,
        exchanger: Exchanger,
        store: RunStore,
        plan: Plan,
        trust: Trust,
    ) -> None:
        self._exchanger = exchanger
        self._store = store
        self._plan = plan
        self._trust = trust
        self.failed: dict[int, str] = {}
        self.silences = Counter[int]()

    def forget(self) -> None:
        """Give every node a new chance."""
        self.failed.clear()
        self.silences.clear()

    def establish(self) -> ServerSession:
        """Join all owners that consent to a run's first roster, and return the session.

        An owner that fails after its join spoils the roster, so joining starts again without it, and as
        another run.

        Raises:
            QuorumNotMet: Too few owners consent, or joining failed three times.
        """
        nodes = wait_for_owners(self._exchanger, self._plan)
        self.forget()
        for left in reversed(range(TRIES)):
            # owners know the run by this, people by the folder's name, which ends with its first digits
            run = self._store.digits + secrets.token_hex(32)[len(self._store.digits) :]
            request = Request(JoinRequest(run=run, plan=self._plan.fields()).to_bytes())
            members = self.joined(run, dict.fromkeys(nodes, request))
            session = self.agreed(run, members) if self.are_enough(members) else None
            if session is not None:
                return ServerSession(run, session, members)
            nodes = {
                node: since
                for node, since in nodes.items()
                if node not in self.failed and self.silences[node] < 2
            }
            if left:
                self.wait_for(self.silent())
        raise QuorumNotMet(f"joining failed {TRIES} times")

    def silent(self) -> set[int]:
        """Return the nodes that were silent once, as with a broken connection, and did not refuse."""
        return {node for node, times in self.silences.items() if times == 1} - self.failed.keys()

    def wait_for(self, nodes: Collection[int]) -> None:
        """Give nodes time to come back, but for those that count as gone whatever they do."""
        awaited = set(nodes) - set(self._exchanger.expelled())
        deadline = time.monotonic() + min(RETURN_S, self._plan.deadlines.join_s)
        while awaited - self._exchanger.online().keys() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def are_enough(self, members: Collection[str]) -> bool:
        """Tell whether enough owners joined for a roster.

        Raises:
            QuorumNotMet: They are too few, and nobody is left that was silent only once.
        """
        if len(members) >= self._plan.cohort.minimum:
            return True
        if 1 not in self.silences.values():
            raise QuorumNotMet(
                f"{len(members)} owners joined, {self._plan.cohort.minimum} are needed; "
                f"refusals: {self._codes()}"
            )
        return False

    def joined(
        self, run: str, requests: dict[int, Request], start: Start | None = None
    ) -> dict[str, Member]:
        """Ask nodes to join; returns who consents, by fingerprint in ascending order.

        Args:
            run: The run's identifier.
            requests: A join request by node.
            start: What the requests say of a later roster.
        """
        members: dict[str, Member] = {}
        known = {node: (key, since) for key, (node, since) in self._exchanger.online_by_key().items()}
        for reply in self._ask("query.join", requests):
            try:
                member = self._member(run, reply, start)
            except FedsealError as error:
                self._refuse(reply.node, node_digest(reply.node), "query.join", error)
                continue
            member.node_key, member.activated = known.get(reply.node, ("", ""))
            members[member.fingerprint] = member
        members = dict(sorted(members.items()))
        self._store.event("joined", owners=len(members), members=list(members))
        return members

    def agreed(self, run: str, members: dict[str, Member]) -> str | None:
        """Let members exchange keys; returns the session's hash, or None if one of them failed."""
        replies = self._roster(run, members)
        return self._keys(run, members, replies) if replies.keys() == members.keys() else None

    def _codes(self) -> str:
        codes = [refusal["code"] for refusal in self._store.refusals()]
        return ", ".join(sorted(set(codes))) or "none"

    def _member(self, run: str, reply: Reply, start: Start | None) -> Member:
        joined = JoinReply.from_bytes(reply.body)
        certified = verify_signing_certificate(
            joined.certificate, self._trust.authority, self._trust.revocations, datetime.now(UTC)
        )
        body = verify(joined.join, certified.public_key, Join)
        if (body.run, body.plan_hash, body.start) != (run, self._plan.sha256(), start):
            raise ProtocolViolation("a join is for another run, plan or roster")
        return Member(
            name=certified.name,
            fingerprint=certified.fingerprint,
            node=reply.node,
            node_key="",
            public_key=certified.public_key,
            joined=joined,
            first_head=body.ledger,
            last_head=body.ledger,
            roster=1 if start is None else start.roster,
            known_round=0 if start is None else start.round,
        )

    def _roster(self, run: str, members: dict[str, Member]) -> dict[str, RosterReply]:
        joins = [member.joined for member in members.values()]
        request = Request(RosterRequest(run=run, members=joins).to_bytes())
        replies: dict[str, RosterReply] = {}
        nodes = {member.node: member for member in members.values()}
        for reply in self._ask("query.roster", dict.fromkeys(nodes, request), nodes):
            member = nodes[reply.node]
            try:
                answer = RosterReply.from_bytes(reply.body)
                body = verify(answer.wraps, member.public_key, Wraps)
                _check_wraps(answer, body, joins, member.joined)
            except FedsealError as error:
                self._refuse(member.node, member.fingerprint, "query.roster", error)
                continue
            replies[member.fingerprint] = answer
        return dict(sorted(replies.items()))

    def _keys(self, run: str, members: dict[str, Member], replies: dict[str, RosterReply]) -> str | None:
        wraps = [reply.wraps for reply in replies.values()]
        trees = {s: WrapTree(wrap_digests(r.seeds, r.keys, r.dealt)) for s, r in replies.items()}
        requests = {
            member.node: Request(
                KeysRequest(
                    run=run,
                    wraps=wraps,
                    proofs={s: tree.proof(own) for s, tree in trees.items() if s != own},
                    seeds={s: r.seeds[own] for s, r in replies.items() if own in r.seeds},
                    key=next((r.keys[own] for r in replies.values() if own in r.keys), None),
                    dealt=next((r.dealt for r in replies.values() if own in r.keys), None),
                    heads=_returned_heads(member, replies.values()),
                ).to_bytes()
            )
            for own, member in members.items()
        }
        session = signed_hash(wraps)
        nodes = {member.node: member for member in members.values()}
        confirmed: set[str] = set()
        for reply in self._ask("query.keys", requests, nodes):
            member = nodes[reply.node]
            try:
                answer = KeysReply.from_bytes(reply.body)
                if verify(answer.session, member.public_key, Session).session != session:
                    raise ProtocolViolation("an owner confirmed another session")
                confirmed.add(member.fingerprint)
            except FedsealError as error:
                self._refuse(member.node, member.fingerprint, "query.keys", error)
        return session if confirmed == members.keys() else None

    def _refuse(self, node: int, owner: str, kind: str, error: FedsealError) -> None:
        # the detail may name a field as its sender spelled it, line breaks included
        _LOG.warning("an answer to %s is refused: %s %s", kind, error.code, ascii(error.detail)[:200])
        self.failed[node] = error.code
        self._store.refuse(owner, kind, error.code)

    def _ask(
        self, kind: str, requests: dict[int, Request], members: Mapping[int, Member] | None = None
    ) -> Iterable[Reply]:
        silent = set(requests)
        for reply in self._exchanger.ask(kind, requests, self._plan.deadlines.join_s):
            silent.discard(reply.node)
            if reply.code is None:
                yield reply
            else:
                self.failed[reply.node] = reply.code
                member = None if members is None else members[reply.node]
                owner = node_digest(reply.node) if member is None else member.fingerprint
                self._store.refuse(owner, kind, reply.code)
                self._store.event("refused", exchange=kind, code=reply.code)
        for node in silent:
            _LOG.warning("an owner does not answer %s", kind)
            self.silences[node] += 1


def _returned_heads(member: Member, replies: Iterable[RosterReply]) -> list[Signed]:
    """Return what peers hold of a member's messages, one per ledger head; only what it truly signed."""
    found: dict[str, Signed] = {}
    for signed in (reply.heads.get(member.fingerprint) for reply in replies):
        if signed is not None:
            with suppress(FedsealError):
                found[signed_head(signed, member.public_key).head] = signed
    return [found[head] for head in sorted(found)]


def _check_wraps(answer: RosterReply, body: Wraps, joins: Sequence[JoinReply], own: JoinReply) -> None:
    """Check that an owner wrapped for exactly its peers, and sent what it signed and committed to.

    Whoever got other wraps would refuse them, and would be blamed instead of their sender.
    """
    signers = [reply.join.signer for reply in joins]
    peers = set(signers) - {own.join.signer}
    if body.roster_hash != signed_hash([reply.join for reply in joins]) or set(answer.seeds) != peers:
        raise ProtocolViolation("wraps are for another roster")
    if Join.from_fields(own.join.body).nonce_commitment != digest(body.nonce):
        raise ProtocolViolation("a member revealed another nonce than it committed to")
    deals = own.join.signer == signers[0]
    if (body.key_commitment is not None, answer.dealt is not None) != (deals, deals):
        raise ProtocolViolation("exactly the first member must deal the encryption key")
    if set(answer.keys) != (peers if deals else set()):
        raise ProtocolViolation("the encryption key is not dealt to exactly the roster")
    if body.wraps_hash != WrapTree(wrap_digests(answer.seeds, answer.keys, answer.dealt)).root:
        raise ProtocolViolation("wraps are not the ones that their sender signed")
