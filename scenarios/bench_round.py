"""The benchmark `round`: what a round over real processes takes, beside one without privacy and encryption.

Every measurement starts a federation anew: a coordinator, a node per owner, a run of a few rounds; the
first round, in which everything is loaded, does not count. As a module it is an arm:
``python -m scenarios.bench_round ARM``.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import tomli_w

from crypto.presets import packing_for
from protocol.environment import prepare_environment
from protocol.errors import BenchmarkFailed
from protocol.plan import Plan
from scenarios.bench_arms import Arm, Figures, Job, Metric, Size
from scenarios.bench_targets import Entry, Run, Target, evaluate, median_of, ratio_of
from scenarios.bench_worker import serve_arm
from scenarios.demo import start_federation, start_limit_s, wait_for_coordinator
from scenarios.federation import Federation, PolicySettings, make_federation
from scenarios.official_flower import ended_rounds, start_official, submit_official
from scenarios.process_meter import ProcessMeter, Samples
from scenarios.processes import Processes
from server.listeners.sockets import free_port
from server.store import RunStore
from server.submit import prepare_run, submit
from server.watch import follow
from tasks.partition import Shard, write_examples

PIXELS: Final = 28
CLASSES: Final = 10
ROWS: Final = 640
BATCH: Final = 64
STEPS: Final = 10
EXCHANGES: Final = ("fit", "seal", "open")
LEAST_OWNERS: Final = 3
REHEARSED: Final = 10_000
DEADLINE_S: Final = 3600.0

LABELS: Final = {
    "private": ("fedseal", "DP-SGD, BFV and masks, three exchanges, TLS 1.3 on both sides"),
    "plain": ("plain FedAvg", "SGD, float32, one exchange, over fedseal's coordinator and nodes"),
    "official": ("flower-supernode", "SGD, float32, FedAvg, Flower's own programs, without TLS"),
}
ROUNDS: Final = {"private": 4, "plain": 4, "official": 3}

METRICS: Final = (
    Metric("round_s", "a round, wall s", ".2f"),
    *(Metric(f"{name}_s", f"exchange {name}, wall s", ".2f") for name in EXCHANGES),
    Metric("cpu_s", "a round, CPU s of all processes", ".2f"),
    *(Metric(f"{name}_cpu_s", f"exchange {name}, CPU s", ".2f") for name in EXCHANGES),
    Metric("owners_s", "slowest owners' own work, wall s", ".2f", compared=False),
    Metric("overhead_s", "a round less that work, wall s", ".2f", compared=False),
    Metric("server_growth_mib", "coordinator's peak above the round's start, MiB", ".0f", compared=False),
    Metric("server_growth", "the same in encrypted updates", ".2f", compared=False),
    Metric("node_growth_mib", "all owners' peak above the round's start, MiB", ".0f", compared=False),
)

NOTES: Final = (
    f"Each owner has {ROWS} rows and takes {STEPS} steps on batches of {BATCH} in a round, in all arms.",
    "Rounds after the first, from the end of one to the end of the next, medians of a run.",
    "Owners' own work: training, encrypting, adding and decrypting, as their logs state it; the slowest"
    " owner of each exchange. What is left is transport, checks, and the coordinator's checkpoint.",
    "Memory: highest resident memory of all the coordinator's processes during the three exchanges, above"
    " what it was when the round began; the model and the optimizer's step are not in it.",
)

_ANSWERED = re.compile(r"(train\.fit|train\.seal|query\.open) answered in ([0-9.]+) s")


def build(size: Size) -> Job:
    """Say what to measure.

    Raises:
        BenchmarkFailed: There are too few owners for a cohort.
    """
    if size.clients < LEAST_OWNERS:
        raise BenchmarkFailed(f"a round takes {LEAST_OWNERS} owners at the least")
    arms = [
        Arm(key, *names, (sys.executable, "-m", "scenarios.bench_round", key))
        for key, names in LABELS.items()
    ]
    request = {"parameters": size.parameters, "clients": size.clients}
    return Job(
        settings=request,
        arms=arms,
        metrics=METRICS,
        request=request,
        judge=dict,
        facts={"widths": hidden_widths(size.parameters), "rows": ROWS, "steps": STEPS, "batch": BATCH},
        references={},
        notes=NOTES,
    )


def evaluate_round(runs: Sequence[Run]) -> dict[str, Entry]:
    """Return all targets of the benchmark."""
    return evaluate(TARGETS, runs)


# --- what is trained ---------------------------------------------------------------------------------


def hidden_widths(parameters: int) -> list[int]:
    """Return two equal hidden widths that give a network of about this many parameters."""
    linear = PIXELS**2 + CLASSES + 2
    return [max(1, round((math.sqrt(linear**2 + 4 * parameters) - linear) / 2))] * 2


def plan_for(parameters: int, owners: int, rounds: int) -> Plan:
    """Return the plan of a measurement."""
    limits = dict.fromkeys(("join_s", "fit_s", "seal_s", "open_s", "pause_s"), DEADLINE_S)
    return Plan.from_fields(
        {
            "run": {"name": "bench-round", "rounds": rounds},
            "task": {
                "name": "image-classification",
                "input_shape": [PIXELS, PIXELS],
                "value_range": [0.0, 1.0],
                "classes": CLASSES,
            },
            "model": {"name": "mlp", "hidden": hidden_widths(parameters)},
            "cohort": {"minimum": owners, "maximum": owners},
            "deadlines": limits,
            "training": {"local_steps": STEPS, "learning_rate": 0.1},
            "privacy": {
                "target_epsilon": 8.0,
                "delta": 1e-6,
                "sample_rate": BATCH / ROWS,
                "expected_batch_size": float(BATCH),
            },
        }
    )


def shards(owners: int) -> list[Shard]:
    """Return rows for each owner; their content does not matter to what is measured."""
    generator = np.random.default_rng(0)
    return [
        (
            generator.random((ROWS, PIXELS, PIXELS), dtype=np.float32),
            generator.integers(0, CLASSES, ROWS),
        )
        for _ in range(owners)
    ]


# --- arms --------------------------------------------------------------------------------------------


def measure_private(request: Mapping[str, Any]) -> Figures:
    """Run fedseal as it is."""
    with tempfile.TemporaryDirectory(prefix="fedseal-round-") as name:
        folder, owners = Path(name), int(request["clients"])
        plan = plan_for(int(request["parameters"]), owners, ROUNDS["private"])
        federation = _federation(folder / "federation", owners)
        with Processes(folder / "logs") as processes:
            start_federation(processes, federation)
            figures = _followed(processes, federation, plan)
        logs = [folder / "logs" / f"{owner.name}.log" for owner in federation.owners]
        owners_s = owners_work(file.read_text(encoding="utf-8") for file in logs)
        packing = packing_for(plan.encryption.preset, owners)
        update = packing.frames_for(int(request["parameters"])) * packing.frame_bytes / 1024**2
    round_s, growth = figures["round_s"] or 0.0, figures["server_growth_mib"] or 0.0
    return figures | {
        "owners_s": owners_s,
        "overhead_s": round_s - owners_s,
        "server_growth": growth / update,
    }


def measure_plain(request: Mapping[str, Any]) -> Figures:
    """Run FedAvg over fedseal's coordinator and nodes."""
    with tempfile.TemporaryDirectory(prefix="fedseal-round-") as name:
        folder, owners = Path(name), int(request["clients"])
        plan = plan_for(int(request["parameters"]), owners, ROUNDS["plain"])
        federation = _federation(folder / "federation", owners)
        plan_file, data = _written(folder, plan, owners)
        with Processes(folder / "logs") as processes:
            port = free_port()
            program = (sys.executable, "-m", "scenarios.plain_fedavg")
            home = federation.server_home
            processes.start(
                "coordinator",
                ["coordinator", str(home), str(port)],
                federation.server_passphrase,
                program=program,
            )
            for owner, file in zip(federation.owners, data, strict=True):
                where = ["node", str(owner.folder), f"127.0.0.1:{port}", str(plan_file), str(file)]
                wait_for_coordinator(processes, home)
                processes.start(owner.name, where, owner.passphrase, program=program)
            return _followed(processes, federation, plan)


def measure_official(request: Mapping[str, Any]) -> Figures:
    """Run FedAvg by Flower's own programs."""
    with tempfile.TemporaryDirectory(prefix="fedseal-round-") as name:
        folder, owners = Path(name), int(request["clients"])
        plan = plan_for(int(request["parameters"]), owners, ROUNDS["official"])
        _plan_file, data = _written(folder, plan, owners)
        with Processes(folder / "logs") as processes:
            port = start_official(processes, folder, data)
            pids = processes.pids()
            nodes = [pid for key, pid in pids.items() if key != "superlink"]
            with ProcessMeter({"server": [pids["superlink"]], "nodes": nodes}) as meter:
                submit_official(folder, port)
                ends = _official_ends(processes, folder, plan.run.rounds)
            return _figures(meter.samples, ends, [])


def _official_ends(processes: Processes, folder: Path, rounds: int) -> list[float]:
    deadline = time.monotonic() + DEADLINE_S
    while len(ends := ended_rounds(folder)) < rounds + 1:
        if processes.ended() or time.monotonic() > deadline:
            raise BenchmarkFailed("Flower's run did not end")
        time.sleep(0.1)
    return ends


def _federation(folder: Path, owners: int) -> Federation:
    settings = PolicySettings(epsilon_total=1e3, epsilon_per_run=100.0)
    return make_federation(folder, shards(owners), settings)


def _written(folder: Path, plan: Plan, owners: int) -> tuple[Path, list[Path]]:
    plan_file = folder / "plan.toml"
    fields = plan.model_dump(mode="json", exclude_none=True)
    plan_file.write_text(tomli_w.dumps(fields), encoding="utf-8")
    files = [folder / f"owner-{index + 1}.npz" for index in range(owners)]
    for file, shard in zip(files, shards(owners), strict=True):
        write_examples(file, *shard)
    return plan_file, files


def _followed(processes: Processes, federation: Federation, plan: Plan) -> Figures:
    """Submit a plan to a federation that was started, follow it, and say what it took."""
    store = prepare_run(federation.server_home, plan, None)
    try:
        wait_for_coordinator(processes, federation.server_home)
        pids = processes.pids()
        nodes = [pid for name, pid in pids.items() if name != "coordinator"]
        with ProcessMeter({"server": [pids["coordinator"]], "nodes": nodes}) as meter:
            submit(federation.server_home, store, federation.link())
            follow(store, lambda _kind, _facts: None, begin_s=start_limit_s(processes))
        ends, seconds = _ends(store)
        return _figures(meter.samples, ends, seconds)
    finally:
        store.close()


def _ends(store: RunStore) -> tuple[list[float], list[Mapping[str, float]]]:
    """Return when the session stood and each round ended, and the seconds of each round's exchanges."""
    ends, seconds = [], []
    for _identifier, moment, kind, facts in store.events():
        if kind in ("session", "round"):
            ends.append(datetime.fromisoformat(moment).timestamp())
        if kind == "round":
            seconds.append(facts["seconds"])
    return ends, seconds


def _figures(
    samples: Mapping[str, Samples], ends: Sequence[float], seconds: Sequence[Mapping[str, float]]
) -> Figures:
    """Return the medians over all rounds but the first.

    Args:
        samples: Of the coordinator's and of the nodes' processes.
        ends: When the session stood, then the end of each round.
        seconds: Wall time of each round's exchanges, in their order, if they are known.
    """
    rounds = list(pairwise(ends))[1:]

    def cpu(start: float, end: float) -> float:
        return sum(group.cpu_between(start, end) for group in samples.values())

    figures: Figures = {
        "round_s": statistics.median(end - start for start, end in rounds),
        "cpu_s": statistics.median(cpu(start, end) for start, end in rounds),
        "server_growth_mib": _growth(samples["server"], rounds, seconds),
        "node_growth_mib": _growth(samples["nodes"], rounds, seconds),
    }
    for index, name in enumerate(EXCHANGES):
        spans = []
        for (start, _end), exchange in zip(rounds, seconds[1:], strict=False):
            values = list(exchange.values())
            if index < len(values):
                spans.append((start + sum(values[:index]), start + sum(values[: index + 1])))
        known = bool(spans)
        figures[f"{name}_s"] = statistics.median(b - a for a, b in spans) if known else None
        figures[f"{name}_cpu_s"] = statistics.median(cpu(a, b) for a, b in spans) if known else None
    return figures


def _growth(
    samples: Samples, rounds: Sequence[tuple[float, float]], seconds: Sequence[Mapping[str, float]]
) -> float:
    """Return by how much memory rose at most while messages were exchanged, above the round's start."""
    lengths = [sum(exchange.values()) for exchange in seconds[1:]] or [end - start for start, end in rounds]
    spans = zip(rounds, lengths, strict=True)
    return max(samples.rss_growth_mib(start, start + length) for (start, _end), length in spans)


def owners_work(logs: Iterable[str]) -> float:
    """Return the owners' own work in a round, in seconds: the slowest of each exchange, medians of rounds.

    Args:
        logs: Each owner's own log of one run.
    """
    rounds: dict[int, dict[str, float]] = {}
    for log in logs:
        number, spent = 0, dict[tuple[int, str], float]()
        for kind, duration in _ANSWERED.findall(log):
            number += kind == "train.fit"
            spent[number, kind] = spent.get((number, kind), 0.0) + float(duration)
        for (number, kind), duration in spent.items():
            slowest = rounds.setdefault(number, {})
            slowest[kind] = max(slowest.get(kind, 0.0), duration)
    return statistics.median(sum(slowest.values()) for number, slowest in rounds.items() if number > 1)


def rehearsed(measure: Callable[[Mapping[str, Any]], Figures]) -> Callable[[Mapping[str, Any]], Figures]:
    """Let an arm rehearse with the fewest owners and a tiny model; its first round warms it up as it is."""

    def answer(request: Mapping[str, Any]) -> Figures:
        tiny = {"parameters": REHEARSED, "clients": LEAST_OWNERS} if request.get("rehearsal") else {}
        return measure({**request, **tiny})

    return answer


ARMS: Final[Mapping[str, Callable[[Mapping[str, Any]], Figures]]] = {
    "private": measure_private,
    "plain": measure_plain,
    "official": measure_official,
}

# --- targets -----------------------------------------------------------------------------------------


def _is_size(run: Run, parameters: int, clients: int | None = None) -> bool:
    settings = run["settings"]
    return settings["parameters"] == parameters and clients in (None, settings["clients"])


TARGETS: Final = (
    Target(
        "overhead_s.3x0.1M",
        "a round beyond training and encryption, s",
        1.5,
        median_of("private", "overhead_s"),
        partial(_is_size, parameters=100_000, clients=3),
        "100,000 parameters and 3 clients",
    ),
    Target(
        "ratio_official.3x0.1M",
        "Flower's own round to fedseal's",
        None,
        ratio_of("official", "private", "round_s"),
        partial(_is_size, parameters=100_000, clients=3),
        "100,000 parameters and 3 clients",
        least=15.0,
    ),
    Target(
        "private_over_plain.10x1M",
        "fedseal's round to plain FedAvg's",
        1.3,
        ratio_of("private", "plain", "round_s"),
        partial(_is_size, parameters=1_000_000, clients=10),
        "1,000,000 parameters and 10 clients",
    ),
    Target(
        "server_peak_over_update.10M",
        "coordinator's memory to an encrypted update",
        2.5,
        median_of("private", "server_growth"),
        partial(_is_size, parameters=10_000_000),
        "10,000,000 parameters",
    ),
)
"""The limits of the benchmark, each for the size that its key names."""

if __name__ == "__main__":
    prepare_environment()
    serve_arm(lambda: rehearsed(ARMS[sys.argv[1]]), ("flwr", "torch", "tenseal"))
