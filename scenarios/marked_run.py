"""One marked federation run twice, as it is and with encryption off, and searched both times.

In the control owners answer `train.seal` with their plain update in place of the ciphertext. The product
has no such mode: the answers are replaced here, between an owner's app and the socket. Coordinator, tap and
search are the same in both runs, so that what the search finds in the control shows that it can find it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Message

from audit.collecting.collect import collect
from audit.collecting.markers import Marker, Search, Searched, marker_scan
from audit.evidence.experiments import MarkerScan, Place
from audit.evidence.run import RunEvidence
from audit.pages.render import html
from audit.report import build_report
from crypto.auditlog import FOLDER as LOG
from crypto.measuring import plan_context
from protocol.encoding import encode
from protocol.errors import AuditUnfounded, FedsealError
from protocol.messages import FitRequest, SealRequest
from protocol.plan import Plan
from protocol.records import from_record, to_record
from scenarios.apart import ENDED, Apart, Frame, start_apart
from scenarios.grid import LocalGrid
from scenarios.marked import Marked, make_marked
from scenarios.processes import Processes
from server.runs import note_interruption
from server.store import RunStore

SEED_BYTES = 64
_RUNS = {"control": "running one round with encryption off", "run": "running the plan with encryption on"}
_END_S, _POLL_S = 20.0, 0.05


@dataclass(frozen=True)
class MarkedResult:
    """What a laboratory's federation left.

    Attributes:
        evidence: Of the run with encryption on.
        scans: One per place that could be searched.
        ciphertexts: Encrypted frames that arrived, and how many of them had arrived before.
        left_out: Why a place could not be searched, in plain words; empty if all were.
    """

    evidence: RunEvidence
    scans: list[MarkerScan]
    ciphertexts: tuple[int, int]
    left_out: str


@dataclass
class Traces:
    """What was found of the markers in each place during and after one run."""

    disk: list[Searched] = field(default_factory=list)
    memory: list[Searched] = field(default_factory=list)
    wire: Searched = field(default_factory=lambda: Searched(0, frozenset()))
    left_out: str = ""


def run_marked(plan: Plan, folder: Path, limit_s: float, progress: Callable[[str], None]) -> MarkedResult:
    """Run a plan with marked owners, once with encryption off and once as it is.

    Args:
        plan: Resolved; all its rounds are run.
        folder: New or empty; everything is made below it.
        limit_s: The run is paused, at a round's beginning, when it has taken this long.
        progress: Called with a line of text at each step.

    Raises:
        ServerUnavailable: The coordinator's process ended by itself.
        AuditUnfounded: The owners refused the plan.
        FedsealError: No federation can be made for this plan.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(folder / "logs"))
        stack.enter_context(_logged(folder / "logs" / "owners.log"))
        places = {name: folder / name for name in ("control", "run")}
        stores = {name: stack.enter_context(closing(_store(place, plan))) for name, place in places.items()}
        home = folder / "federation" / "server"
        aparts = {
            name: start_apart(processes, f"{name}-coordinator", folder, place, home)
            for name, place in places.items()
        }
        for apart in aparts.values():
            stack.callback(apart.close)
        progress("making owners with made-up records and planted markers")
        marked = make_marked(plan, folder / "federation")
        stack.callback(marked.close)
        for store in stores.values():
            store.set("nodes", sorted(marked.owners))
        grid = LocalGrid({node: owner.app for node, owner in marked.owners.items()})
        stack.callback(grid.close)
        traces = {}
        for name in places:
            progress(f"{_RUNS[name]}, and searching for the markers")
            exchange = _Exchange(marked, grid, aparts[name], folder, name, limit_s)
            traces[name] = exchange.carry(processes)
        note_interruption(stores["run"])
        _require_begun(stores["run"])
        evidence = collect(stores["run"], home, None, kind="simulation")
        logs = b"".join(_content(place) for place in (folder / "logs", home / LOG))
        scans = _scans(traces, marked.markers(), logs, _draft(evidence))
        return MarkedResult(evidence, scans, stores["run"].ciphertexts(), traces["run"].left_out)


def _require_begun(store: RunStore) -> None:
    if not store.attempts():
        codes = ", ".join(sorted({refusal["code"] for refusal in store.refusals()})) or "no code"
        raise AuditUnfounded(f"the simulated owners did not begin a round of this plan ({codes})")


def shortened(plan: Plan, rounds: int) -> Plan:
    """Return a resolved plan with at most so many rounds and the same noise, more than it then needs."""
    run = plan.run.model_copy(update={"rounds": min(rounds, plan.run.rounds)})
    return plan.model_copy(update={"run": run})


class _Exchange:
    """One run: answers the coordinator, and looks at it while it waits."""

    def __init__(
        self, marked: Marked, grid: LocalGrid, apart: Apart, folder: Path, name: str, limit_s: float
    ) -> None:
        self._marked, self._grid, self._apart = marked, grid, apart
        self._folder, self._name = folder, name
        self._plain = name == "control"
        self._deadline = time.monotonic() + limit_s
        self._sealed, self._looked = 0, False
        self.traces = Traces()

    def carry(self, processes: Processes) -> Traces:
        """Let the coordinator run, and return what was found."""
        tap = self._folder / f"{self._name}.wire"
        with tap.open("wb") as file:
            self._apart.serve(self._answer, file)
        self._apart.close()
        process = f"{self._name}-coordinator"
        deadline = time.monotonic() + _END_S
        while process in processes.pids() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        search = Search(self._marked.markers())
        with tap.open("rb") as file:
            self.traces.wire = search.in_stream(file)
        return self.traces

    def _answer(self, asked: Frame) -> Frame | None:
        if asked.kind == ENDED:
            self._look()
            return Frame()
        if asked.kind == "train.fit" and time.monotonic() > self._deadline:
            return None
        arrived = self._sealed >= len(self._marked.owners) - 1
        if asked.kind == "train.seal" and arrived and not self._looked:
            # the others' frames have arrived and been kept, and the coordinator waits for this answer
            self._looked = True
            self._look()
            if self._plain:
                return None
        message = Message(to_record(asked.body, asked.blob), asked.node, asked.kind)
        (reply,) = self._grid.send_and_receive([message])
        if reply.has_error():
            return Frame(code=reply.error.reason or FedsealError.code)
        body, blob = from_record(reply.content)
        if asked.kind == "train.fit":
            self._plant(asked)
        if asked.kind == "train.seal" and SealRequest.from_bytes(asked.body).part == 0:
            self._sealed += 1
            blob = self._in_plain(asked.node, blob) if self._plain else blob
        return Frame(body=body, blob=blob)

    def _plant(self, asked: Frame) -> None:
        if self._sealed:
            return
        marked = self._marked.owners[asked.node]
        session = FitRequest.from_bytes(asked.body).session
        marked.plant(self._marked.plan, marked.owner.store.by_session(session).run)

    def _in_plain(self, node: int, blob: bytes) -> bytes:
        """Return the first frame with the update's own numbers in place of their encryption."""
        size = plan_context(self._marked.plan).frame_bytes
        plain = self._marked.owners[node].update.astype("<f8").tobytes()[: size - SEED_BYTES]
        return blob[:SEED_BYTES] + plain + blob[SEED_BYTES + len(plain) :]

    def _look(self) -> None:
        search = Search(self._marked.markers())
        home, temporary = self._marked.federation.server_home, f"{self._name}-coordinator-temporary"
        for place in (self._folder / self._name, home, self._folder / temporary):
            self.traces.disk.append(search.in_folder(place))
        try:
            self.traces.memory.append(search.in_process(self._apart.pid))
        except OSError as error:
            self.traces.left_out = f"coordinator memory: {error.strerror or error}"


def _store(place: Path, plan: Plan) -> RunStore:
    store = RunStore(place)
    store.set("plan", plan.fields())
    store.set("plan_hash", plan.sha256())
    return store


@contextmanager
def _logged(file: Path) -> Iterator[None]:
    """Write what owners in this process log, at its most talkative, to a file of the laboratory alone."""
    handler, logger = logging.FileHandler(file), logging.getLogger("fedseal")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        handler.close()


def _content(folder: Path) -> bytes:
    return b"\n".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def _draft(evidence: RunEvidence) -> bytes:
    """Return the report of the marked run, in both of its forms."""
    report = build_report(evidence, datetime.now(UTC))
    return encode(report) + html(report).encode()


def _scans(traces: dict[str, Traces], markers: list[Marker], logs: bytes, draft: bytes) -> list[MarkerScan]:
    run, control, search = traces["run"], traces["control"], Search(markers)
    quotes = b"\n".join(min(one.spellings) for one in markers)
    pairs: list[tuple[Place, Searched, Searched]] = [
        ("wire", run.wire, control.wire),
        ("disk", Searched.together(run.disk), Searched.together(control.disk)),
        ("logs", search.in_bytes(logs), search.in_bytes(logs + quotes + logs)),
        ("reports", search.in_bytes(draft), search.in_bytes(draft + quotes + draft)),
    ]
    if run.memory and control.memory:
        memory = Searched.together(run.memory), Searched.together(control.memory)
        pairs.append(("coordinator memory", *memory))
    return [marker_scan(place, found, other, len(markers)) for place, found, other in pairs]
