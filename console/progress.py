"""Live progress of a run on the terminal: what happened, round by round."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from crypto.presets import broken_byte_promise

AGREEMENT = "agreement with the unpruned model on synthetic inputs"
"""As `deploy.measure` names it, which loads PyTorch."""

COLUMNS = (
    ("round", 7, "right"),
    ("accuracy", 9, "right"),
    ("epsilon spent", 14, "right"),
    ("owners", 7, "right"),
    ("fit", 7, "right"),
    ("seal", 7, "right"),
    ("open", 7, "right"),
    ("sent / owner", 13, "right"),
)


class RunProgress:
    """Prints a line for everything that a run reports.

    Lines are final when they are printed, so that the output reads the same on a terminal, in a log and
    in a pipe.

    Args:
        console: Where to print.
        rounds: Rounds of the plan.
        protected: Whether the plan adds noise; if not, every line says so.
    """

    def __init__(self, console: Console, rounds: int, *, protected: bool) -> None:
        self._console = console
        self._rounds = rounds
        self._protected = protected
        self._head_shown = False

    def show(self, kind: str, facts: dict[str, Any]) -> None:
        """Print one event; kinds that are of no interest print nothing."""
        handler = getattr(self, f"_show_{kind}", None)
        if handler is not None:
            handler(facts)

    def _show_stage(self, facts: dict[str, Any]) -> None:
        self._console.print(Text(f"● {facts['text']}", style="bold"))

    def _show_step(self, facts: dict[str, Any]) -> None:
        self._console.print(Text(f"    {facts['text']}", style="dim"))

    def _show_processes(self, facts: dict[str, Any]) -> None:
        listed = ", ".join(f"{name} (pid {pid})" for name, pid in facts["pids"].items())
        self._show_step({"text": listed})

    def _show_joined(self, facts: dict[str, Any]) -> None:
        self._show_step({"text": f"{facts['owners']} owners checked the plan and joined"})

    def _show_session(self, facts: dict[str, Any]) -> None:
        agreed = f"{facts['owners']} owners agreed on keys that the coordinator cannot use"
        if "new" in facts:
            new = f"; new: {', '.join(facts['new'])}" if facts["new"] else ""
            agreed = f"from round {facts['round'] + 1} on, {agreed}{new}"
        self._show_step({"text": agreed})

    def _show_refused(self, facts: dict[str, Any]) -> None:
        who = facts.get("owner", "an owner")
        self._console.print(Text(f"    {who} refused: {facts['code']}", style="yellow"))

    def _show_absent(self, facts: dict[str, Any]) -> None:
        self._warn(f"{facts['owner']} is left out until it returns: {facts['reason']}")

    def _show_excluded(self, facts: dict[str, Any]) -> None:
        self._warn(f"{facts['owner']} is left out of the run: {facts['reason']}")

    def _show_objects(self, facts: dict[str, Any]) -> None:
        self._warn(
            f"{facts['owner']} refuses another's certificate, and is left out until there is news of it"
        )

    def _show_awaiting_list(self, facts: dict[str, Any]) -> None:
        self._warn(
            f"waiting up to {facts['seconds']:.0f} s for the newest revocation list (fedseal home crl)"
        )

    def _show_returned(self, facts: dict[str, Any]) -> None:
        self._show_step({"text": f"{facts['owner']} is back: {facts['how']}"})

    def _show_waiting(self, facts: dict[str, Any]) -> None:
        self._warn(f"waiting for owners: {facts['owners']} are there, {facts['needed']} are needed")

    def _show_resumed(self, facts: dict[str, Any]) -> None:
        self._show_step({"text": f"going on after round {facts['rounds']} with the same keys"})

    def _warn(self, text: str) -> None:
        self._console.print(Text(f"    {text}", style="yellow"))

    def _show_void(self, facts: dict[str, Any]) -> None:
        text = f"    attempt {facts['attempt']} is void ({facts['code']}); nothing was opened"
        self._console.print(Text(text, style="yellow"))

    def _show_ran_away(self, facts: dict[str, Any]) -> None:
        self._warn(f"round {facts['round']} gave a model that ran away ({facts['code']}); the run ends")

    def _show_round(self, facts: dict[str, Any]) -> None:
        if not self._head_shown:
            self._console.print(Text(_row([name for name, _, _ in COLUMNS]), style="bold"))
            self._head_shown = True
        accuracy, seconds = facts["accuracy"], facts["seconds"]
        losses = [loss for loss in facts["epsilon"].values() if loss is not None]
        line = _row(
            [
                f"{facts['round']}/{self._rounds}",
                "-" if accuracy is None else f"{accuracy:.4f}",
                _losses(losses),
                str(facts["contributors"]),
                *(f"{seconds[part]:.2f} s" for part in ("fit", "seal", "open")),
                format_bytes(facts["upload_bytes"]),
            ]
        )
        self._console.print(Text(line, style="" if self._protected else "bold red"))

    def _show_evaluation(self, facts: dict[str, Any]) -> None:
        kind = "noised" if self._protected else "NOT NOISED"
        if facts["accuracy"] is None:
            figure = "too few records for this noise"
        else:
            figure = f"{facts['accuracy']:.3f} +- {facts['standard_error']:.3f}"
        losses = [loss for loss in facts["epsilon"].values() if loss is not None]
        text = f"    federated accuracy ({kind}) {figure}, epsilon spent {_losses(losses)}"
        self._console.print(Text(text, style="cyan" if self._protected else "bold red"))


def _losses(losses: list[float]) -> str:
    """Return what the owners spent; one figure where it is the same for all."""
    if not losses:
        return "NO PRIVACY"
    least, most = f"{min(losses):.3f}", f"{max(losses):.3f}"
    return most if least == most else f"{least}-{most}"


def _row(cells: list[str]) -> str:
    padded = [cell.rjust(width) for cell, (_, width, _) in zip(cells, COLUMNS, strict=True)]
    return "  " + " ".join(padded)


def format_bytes(size: float) -> str:
    """Return a size in the largest decimal unit that keeps it above one."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a demo's summary as names and values."""
    model, audit = summary["model"], summary["audit"]
    return [
        ("accuracy on public data", f"{summary['accuracy']:.4f} after {summary['rounds']} rounds"),
        *((f"privacy loss of {owner['name']}", _loss(owner)) for owner in summary["owners"]),
        (
            "an owner sends per round",
            f"{summary['upload_bytes_per_parameter']:.2f} bytes per parameter "
            f"({summary['parameters']} parameters)",
        ),
        (
            "an opener receives per round",
            f"{summary['download_bytes_per_parameter']:.2f} bytes per parameter",
        ),
        ("transport", f"{summary['tls_version']} with client certificates"),
        ("encryption", _encryption(summary["he"])),
        *_model_rows(model),
        ("audit", f"{audit['verdict']}: {audit['report']}"),
        ("time", f"{summary['wall_s']:.1f} s"),
    ]


def _encryption(he: dict[str, Any]) -> str:
    text = f"{he['scheme']} {he['preset']}, " + ("exact sums" if he["exact"] else "rounded sums")
    if he["frames"] == "packed":
        return text
    broken = broken_byte_promise(he["preset"], he["bytes_per_value"])
    return text + ", frames in SEAL's own form" + (f": {broken}" if broken else "")


def _loss(owner: dict[str, Any]) -> str:
    if owner["epsilon"] is None:
        return "no guarantee: no noise was added"
    return f"epsilon {owner['epsilon']:.3f} at delta {owner['delta']:g}"


def _measured(model: dict[str, Any]) -> str:
    """Say what the model's figure is; without public data it is no accuracy."""
    return "agreement with the unpruned model" if model.get("measure") == AGREEMENT else "accuracy"


def _model_rows(model: dict[str, Any]) -> list[tuple[str, str]]:
    if model["size_ratio"] is None:
        return [("deployed model", "none was built")]
    return [
        (
            "deployed model",
            f"{model['size_ratio']:.1f} times smaller, {model['speed_ratio_b1']:.1f} times faster, "
            f"{_measured(model)} {model['accuracy']:.4f} (drop {model['accuracy_drop']:+.4f})",
        ),
        ("package", model["package"]),
    ]
