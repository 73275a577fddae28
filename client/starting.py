"""Later rosters of a run: which model an owner goes on from, and on which evidence.

Guarantee: an owner never goes back to an earlier round or roster of a run. An owner that is sent the
openings since its last round computes the model itself, as in every round. An owner without them, be it new
or one that missed rounds, accepts a model that a quorum of the roster's members vouches for, which is the
trust that a round's opening has. Not covered: quorum and vouchers count any certified member and not
pinned peers alone, so that members invented by the authority can vouch for a model of their choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from client.following import follow
from client.owner import Owner
from client.state import RunState
from protocol.errors import ModelMismatch, ProtocolViolation, RosterRefused, SessionMismatch
from protocol.messages import Join, JoinRequest, Start
from protocol.optimizers import GlobalModel
from protocol.plan import Plan


def first_model(
    known: RunState | None, request: JoinRequest, blob: bytes, initial: GlobalModel
) -> GlobalModel:
    """Return the model of a run's first roster, which the plan alone decides.

    Raises:
        ProtocolViolation: The run was joined before, or the request brings a model.
    """
    if known is not None:
        raise ProtocolViolation("this run was joined before; only the same request is answered again")
    if request.steps or blob:
        raise ProtocolViolation("a run's first roster starts from the plan's own model")
    return initial


def later_model(
    owner: Owner,
    known: RunState | None,
    request: JoinRequest,
    start: Start,
    blob: bytes,
    initial: GlobalModel,
) -> tuple[GlobalModel, bool]:
    """Return the model that a later roster starts from, and whether this owner computed it itself.

    Args:
        owner: This owner.
        known: Its state of the run, if it was in an earlier roster.
        request: Names the model, and brings the openings that lead to it from this owner's own.
        start: The request's.
        blob: The sums of these openings, or the model.
        initial: The plan's own model.

    Raises:
        ModelMismatch: It is not the named model, or one that this owner has left behind.
        ProtocolViolation: The run is closed or of another plan, or the roster is not a later one.
        SessionMismatch: Openings came, and this owner has no session to check them in.
        EncodingInvalid: The model is malformed.
    """
    if known is not None:
        _require_later(known, request, start)
        if request.steps or not blob:
            return _followed(owner, known, request, start, blob)
    if request.steps:
        raise SessionMismatch("openings came to an owner that was in no session of this run")
    if start.round == 0 and not blob:
        model, vouches = initial, not start.sessions
    else:
        model, vouches = GlobalModel.from_bytes(blob, initial.weights.size), False
    if model.sha256() != start.model_hash:
        raise ModelMismatch("the model is not the one that is named")
    if start.round == 0 and model.sha256() != initial.sha256():
        raise ModelMismatch("before the first round the model is the plan's own")
    if known is not None and known.round == start.round:
        if owner.store.model(known.run).sha256() != model.sha256():
            raise ModelMismatch("this owner has another model after that round")
        vouches = known.computed and _knows_all(known, start)
    return model, vouches


def _require_later(known: RunState, request: JoinRequest, start: Start) -> None:
    if known.stage == "closed":
        raise ProtocolViolation("this run is closed")
    if known.parsed_plan().sha256() != Plan.from_fields(request.plan).sha256():
        raise ProtocolViolation("this run was joined with another plan")
    if known.start is not None and start.roster <= known.start.roster:
        raise ProtocolViolation("a later roster must have a higher number than every earlier one")
    _require_one_past(known, start)
    if start.round < known.round:
        raise ModelMismatch("this owner has applied more rounds than the roster starts from")


def _require_one_past(known: RunState, start: Start) -> None:
    """Refuse a past that is not the one this owner was in: a fork of the run that left it behind."""
    told = [] if known.start is None else known.start.sessions
    if start.sessions[: len(told)] != told:
        raise ProtocolViolation("the run's earlier sessions are not the ones that this owner was told of")
    named = {stage.session: stage.first_round for stage in start.sessions}
    if not set(known.sealed_in) <= named.keys():
        raise ProtocolViolation("a session that this owner sealed in is not among the run's")
    for stage in start.sessions[len(told) :]:
        if stage.first_round != known.keyed_in.get(stage.session, stage.first_round):
            raise ProtocolViolation("a session did not begin where this owner was in it")
        if stage.session not in known.keyed_in and stage.first_round < known.round:
            raise ProtocolViolation("another session began before what this owner has applied")


def _followed(
    owner: Owner, known: RunState, request: JoinRequest, start: Start, blob: bytes
) -> tuple[GlobalModel, bool]:
    model, finished = owner.store.model(known.run), known.round
    # steps that led here before cannot be checked again: they are of a session that ended with its roster
    if request.steps and (model.sha256(), finished) != (start.model_hash, start.round):
        known.keyed_session()
        model, finished = follow(owner, known, request.steps, blob)
    if (model.sha256(), finished) != (start.model_hash, start.round):
        raise ModelMismatch("the openings lead to another model or another round")
    return model, known.computed and _knows_all(known, start)


def _knows_all(known: RunState, start: Start) -> bool:
    """Tell whether an owner knows every session of the run so far: it was told of it, or was in it."""
    told = [] if known.start is None else known.start.sessions
    return all(stage in told or stage.session in known.keyed_in for stage in start.sessions)


def require_vouched(plan: Plan, start: Start | None, joins: Sequence[Join]) -> None:
    """Check that all members start from the same model, and that enough of them computed it themselves.

    Raises:
        RosterRefused: They do not.
    """
    if any(join.start != start for join in joins):
        raise RosterRefused("the members start from different models, rounds or rosters")
    vouching = sum(join.vouches for join in joins)
    if start is not None and (start.round > 0 or start.sessions) and vouching < plan.encryption.quorum:
        raise RosterRefused(
            f"{vouching} members vouch for the model that the roster starts from, "
            f"{plan.encryption.quorum} are needed"
        )
