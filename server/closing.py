"""The end of a run: the last rounds for those that miss them, and the owners' signed statements."""

from __future__ import annotations

from crypto.signing import verify
from protocol.errors import FedsealError, ProtocolViolation
from protocol.messages import CloseReply, CloseRequest, Statement
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from protocol.storage import STORAGE_FAULTS
from server.cohort.members import Member
from server.exchange import Exchanger, Reply, Request
from server.rounds.runner import RoundRunner
from server.store import RunStore


def close_run(
    exchanger: Exchanger, store: RunStore, plan: Plan, runner: RoundRunner, model: GlobalModel
) -> None:
    """Ask all members that are there to close the run, and record their statements.

    Who objected to a member is asked too: no list of owners is in it. Who does not answer, or not as it
    must, is recorded as having given no statement.

    Args:
        exchanger: Sends requests.
        store: Records statements and refusals.
        plan: The resolved plan.
        runner: Knows the session and the openings of all rounds.
        model: After the last round.
    """
    session, requests = runner.session, {}
    for member in runner.attendance.present(objecting=True):
        missed = range(member.known_round + 1, len(runner.steps) + 1)
        message = CloseRequest(
            session=session.session,
            model_hash=model.sha256(),
            steps=runner.steps[member.known_round :],
        )
        requests[member.node] = Request(message.to_bytes(), b"".join(map(store.sums, missed)))
    sessions = [stage["session"] for stage in store.get("sessions")]
    expected = (session.session, sessions, plan.sha256(), model.sha256())
    # a closing that is repeated after a crash must be the same to the byte
    for member in session.members.values():
        store.put_owner(member.fingerprint, member.facts())
    for reply in exchanger.ask("query.close", requests, plan.deadlines.open_s):
        member = session.by_node(reply.node)
        try:
            if reply.code is None:
                _record_statement(store, member, reply, expected)
            else:
                store.refuse(member.fingerprint, "query.close", reply.code)
        except STORAGE_FAULTS:
            raise
        except FedsealError as error:
            store.refuse(member.fingerprint, "query.close", error.code)


def _record_statement(
    store: RunStore, member: Member, reply: Reply, expected: tuple[str, list[str], str, str]
) -> None:
    signed = CloseReply.from_bytes(reply.body).statement
    body = verify(signed, member.public_key, Statement)
    if (body.session, body.sessions, body.plan_hash, body.model_hash) != expected:
        raise ProtocolViolation("a statement is about other sessions, another plan or model")
    member.note_statement(signed, body)
    store.put_owner(member.fingerprint, member.facts())
