"""The end of a run, `query.close`: an owner states what it cost and forgets the session's secrets."""

from __future__ import annotations

from client.following import follow
from client.owner import Owner
from client.rounds import discard_pending
from client.state import Outcome, RunState
from crypto.signing import sign
from protocol.errors import ModelMismatch
from protocol.messages import CloseReply, CloseRequest, Statement


def close(owner: Owner, state: RunState, request: CloseRequest, blob: bytes) -> Outcome:
    """Follow the last openings, state what the run cost, and erase the session's secrets.

    Raises:
        ModelMismatch: The openings do not lead to the model that the coordinator names.
    """
    session, plan = state.keyed_session(), state.parsed_plan()
    model, finished = follow(owner, state, request.steps, blob)
    if model.sha256() != request.model_hash:
        raise ModelMismatch("the openings lead to another final model")
    discard_pending(owner, state)
    spent = owner.ledger.spent(state.run)
    owner.ledger.close_run(state.run)
    stages = [] if state.start is None else state.start.sessions
    body = Statement(
        session=session,
        sessions=[*(stage.session for stage in stages), session],
        plan_hash=plan.sha256(),
        model_hash=request.model_hash,
        unit=plan.privacy.unit,
        epsilon=spent.epsilon,
        epsilon_worst=spent.epsilon_worst,
        delta=spent.delta,
        evaluation_epsilon=spent.evaluation_epsilon,
        evaluation_delta=spent.evaluation_delta,
        sealed_attempts=spent.sealed,
        sealed_evaluations=spent.sealed_evaluations,
        void_attempts=spent.void,
        ledger=owner.ledger.head(),
    )
    changed = state.with_changes(
        stage="closed", round=finished, chain_keys={}, bfv_key=None, hpke_secret=None, halves={}
    )
    reply = CloseReply(statement=sign(owner.credentials.signing_key, body))
    return Outcome(changed, reply, model=model)
