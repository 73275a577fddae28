"""The page in a real browser: it stands alone, is silent, fits a telephone, disarms hostile text."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import words
from audit.evidence.run import RunEvidence
from audit.pages import charts, experiment_charts, render
from audit.report import build_report, write_report
from tests.unit.audit_evidence import NOW, OWNERS, evidence, evidence_fields
from tests.unit.audit_experiments import findings, findings_fields, lab
from tests.unit.audit_gallery import run_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]
SECTIONS = {
    "reasons", "guarantee", "budget", "mechanism", "attacks", "received", "rounds", "keys", "deployment",
    "dpia", "reproduce", "versions", "glossary",
}  # fmt: skip
ALL = ["audited", "plain", "simulated", "none", "hostile", "failed", "long", "many"]
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
HOSTILE = '<script>document.title="taken"</script><img src=x onerror=alert(1)>"\'&{{7*7}}'


class Tab:
    """One browser tab, driven over the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while (answer := self._receive()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        return dict(json.loads(self._socket.recv(timeout=30)))

    def open(self, page: Path, width: int = 1280, scheme: str = "light") -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="screen", features=features)
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def value(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[Any]:
        noisy = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        dialogs = ("Page.javascriptDialogOpening",)
        return [event for event in self.events if event.get("method") in noisy + dialogs]

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("needs the Debian package chromium")
    connect = pytest.importorskip("websockets.sync.client").connect
    profile = tmp_path_factory.mktemp("profile")
    process = subprocess.Popen(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        note = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (note.exists() and len(note.read_text().splitlines()) == 2):
            assert process.poll() is None, "chromium ended"
            assert time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.1)
        port, path = note.read_text().splitlines()
        address = f"ws://127.0.0.1:{port}{path}"
        with connect(address, max_size=64 * 1024 * 1024, proxy=None) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of an audited run, of one without experiments, of a simulation, and of runs that went wrong."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = evidence_fields()
    hostile["owners"][0]["name"] = HOSTILE
    hostile["deployment"] = {HOSTILE: HOSTILE}
    hostile["environment"]["packages"] = [{"name": HOSTILE, "version": HOSTILE, "licence": HOSTILE}]
    hostile["transcript"][0]["kind"] = HOSTILE
    nothing: dict[str, Any] = {
        "rounds": [],
        "owners": [],
        "transcript": [],
        "refusals": [],
        "keys": [],
        "certificates": [],
    }
    barely = {
        "state": "failed",
        "session": None,
        "rounds_finished": 0,
        "attempts_used": 0,
        "deployment": None,
    }
    ledger = findings_fields(OWNERS[0])["ledger"] | {"dataset": HOSTILE}
    none = "none"
    reports = {
        "audited": build_report(evidence(), NOW, KEY, lab(), findings()),
        "plain": build_report(evidence(), NOW),
        "simulated": build_report(evidence(kind="simulation"), NOW, KEY, lab()),
        "none": build_report(evidence(none), NOW, None, lab(none), findings(none)),
        "hostile": build_report(RunEvidence.from_fields(hostile), NOW, None, None, findings(ledger=ledger)),
        "failed": build_report(evidence(**nothing, **barely), NOW),
        "long": build_report(run_of(rounds=1000, evaluated=True), NOW),
        "many": build_report(run_of(owners=100), NOW),
    }
    return {name: write_report(report, folder / name)[1] for name, report in reports.items()}


@pytest.mark.parametrize("name", ALL)
def test_page_stands_alone_and_is_silent(tab: Tab, pages: dict[str, Path], name: str) -> None:
    tab.open(pages[name])
    outside = [url for url in tab.requests() if not url.startswith("data:")]
    assert set(outside) <= {pages[name].as_uri()}
    assert tab.complaints() == []
    assert tab.value("document.scripts.length") == 0
    assert pages[name].stat().st_size < 3_000_000


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_page_never_scrolls_sideways(tab: Tab, pages: dict[str, Path], name: str, width: int) -> None:
    tab.open(pages[name], width)
    tab.value("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert tab.value("innerWidth") == width
    assert tab.value("document.documentElement.scrollWidth") <= width


def test_page_has_landmarks_captions_and_text_for_charts(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["audited"])
    assert set(tab.value("[...document.querySelectorAll('main > section')].map(s => s.id)")) == SECTIONS
    assert tab.value("['header','nav','main','footer'].every(name => document.querySelector(name))")
    assert tab.value("document.documentElement.lang") == "en"
    assert tab.value("[...document.querySelectorAll('table')].every(t => t.caption?.textContent.trim())")
    drawn = tab.value("document.querySelectorAll('.chart svg').length")
    assert tab.value("document.querySelectorAll('.chart svg[role=img] > desc').length") == drawn >= 7
    assert tab.value("[...document.images].every(i => i.alt.length > 10 && i.naturalWidth > 0)")
    assert tab.value("document.images.length") >= 6
    assert tab.value("[...document.querySelectorAll('.chart desc')].every(d => d.textContent.length > 40)")
    assert tab.value(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    )
    headings = tab.value("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert headings.count(1) == 1
    assert all(after <= before + 2 for before, after in pairwise(headings))


def test_first_screen_holds_the_verdict_and_what_a_signer_asks(tab: Tab, pages: dict[str, Path]) -> None:
    verdicts = {
        "audited": "PASS", "plain": "INCONCLUSIVE not signed", "simulated": "PASS of a simulation",
        "long": "INCONCLUSIVE not signed", "many": "INCONCLUSIVE not signed",
    }  # fmt: skip
    for name, verdict in verdicts.items():
        tab.open(pages[name])
        assert tab.value("document.querySelector('#verdict').textContent") == verdict
        assert tab.value("document.querySelectorAll('.lines li').length") == 26
        assert tab.value("document.querySelector('.answer').getBoundingClientRect().bottom") <= 900
        assert tab.value("document.querySelector('.todo').getBoundingClientRect().bottom") <= 1300
    tab.open(pages["simulated"])
    head = tab.value("document.querySelector('.verdict-head').innerText")
    assert "A simulation was audited, not a deployment." in head
    tab.open(pages["plain"])
    assert "fedseal audit run" in tab.value("document.querySelector('#reasons').innerText")


def test_absence_of_noise_is_loud_and_red(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["none"], 360)
    assert "No privacy noise" in tab.value("document.querySelector('.alarm').innerText")
    assert tab.value("document.querySelector('.alarm').getBoundingClientRect().top") < 300
    assert (
        tab.value("getComputedStyle(document.querySelector('.alarm')).backgroundColor")
        == "rgb(176, 15, 15)"
    )
    assert tab.value("document.querySelector('#verdict').textContent") == "FAIL not signed"
    assert "No limit" in tab.value("document.querySelector('.epsilon').innerText")
    tab.open(pages["plain"], 360)
    assert tab.value("document.querySelector('.alarm')") is None


def test_hostile_strings_are_shown_not_run(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["hostile"])
    assert tab.value("document.title") != "taken"
    assert tab.value("document.images.length") == 0
    assert tab.value("document.querySelector('.owner h3').textContent") == HOSTILE


CONTRAST = """(() => {
  const linear = x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const luminance = c => { const v = c.map(x => linear(x / 255));
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
  const rgb = t => t.match(/[\\d.]+/g).map(Number);
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3) } return [255, 255, 255] };
  const worst = [];
  for (const e of document.querySelectorAll('body *')) {
    const empty = ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (empty || e.matches('.sr, .skip, desc')) continue;
    const style = getComputedStyle(e);
    const ink = rgb(e.closest('svg') ? style.fill : style.color).slice(0, 3);
    const [a, b] = [luminance(ink), luminance(ground(e))].sort((x, y) => y - x);
    worst.push([(a + .05) / (b + .05), e.tagName + '.' + e.getAttribute('class')]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["audited", "plain", "simulated", "none"])
def test_text_has_enough_contrast(tab: Tab, pages: dict[str, Path], name: str, scheme: str) -> None:
    tab.open(pages[name], scheme=scheme)
    ratio, element = tab.value(CONTRAST)
    assert ratio >= 4.5, element


@pytest.fixture
def shots(tmp_path: Path) -> Callable[[str], Path]:
    """Where screenshots go: FEDSEAL_SCREENSHOTS, or a folder that pytest removes."""
    folder = Path(os.environ.get("FEDSEAL_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: folder / name


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", ["audited", "plain", "simulated", "none", "long", "many"])
def test_page_can_be_pictured(
    tab: Tab, pages: dict[str, Path], shots: Callable[[str], Path], name: str, width: int, scheme: str
) -> None:
    tab.open(pages[name], width, scheme)
    path = shots(f"{name}-{width}-{scheme}.png")
    tab.screenshot(path)
    assert path.stat().st_size > 20_000


# --- the same page as text, without a browser --------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return build_report(evidence("local", 6), NOW, None, lab("local", 6), findings("local", 6))


def test_hostile_names_come_out_escaped() -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}"
    fields = evidence_fields()
    fields["owners"][0]["name"] = hostile
    fields["name"] = hostile
    fields["deployment"] = {hostile: hostile}
    packages = [{"name": hostile, "version": hostile, "licence": hostile}]
    fields["environment"] = {"python": hostile, "platform": hostile, "packages": packages}
    for entry in fields["transcript"]:
        entry["kind"] = hostile
    page = render.html(build_report(RunEvidence.from_fields(fields), NOW))
    assert "<script" not in page
    assert "<img" not in page
    assert "onerror=alert(1)&gt;" in page
    assert "{{7*7}}" in page


def test_page_names_no_other_source(report: dict[str, Any]) -> None:
    page = render.html(report)
    assert len(page.encode()) < 3_000_000
    assert not any(sign in page for sign in ("http://", "https://", "//cdn", "@import", "url(", "<script"))
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_page_says_verdict_reasons_and_figures(report: dict[str, Any]) -> None:
    page = render.html(report)
    assert '<h2 id="verdict">PASS <small>not signed</small></h2>' in page
    bare = build_report(evidence(), NOW)
    said = render.html(bare)
    assert all(item["gap"] in said for item in bare["checks"] if item["status"] == "missing")
    assert all(item["title"].replace("'", "&#39;") in page for item in report["checks"])
    assert f">{report['claims'][0]['spent']['epsilon']:.4g}<" in page
    assert "No privacy noise" not in page
    assert "No privacy noise" in render.html(build_report(evidence("none"), NOW))


def test_charts_stay_inside_and_say_what_they_show(report: dict[str, Any]) -> None:
    for chart in (charts.epsilon_chart(report), charts.accuracy_chart(report)):
        assert chart is not None
        assert all(charts.LEFT <= x <= charts.RIGHT for x, _ in chart.points)
        assert all(charts.TOP <= y <= charts.BOTTOM for _, y in chart.points)
        assert len(chart.summary) > 40
    epsilon = charts.epsilon_chart(report)
    assert epsilon is not None
    assert epsilon.cap is not None
    assert all(y >= epsilon.cap for _, y in epsilon.points)


def test_charts_of_experiments_stay_inside_and_say_what_they_show(report: dict[str, Any]) -> None:
    bounds = experiment_charts.bounds_chart(report)
    assert bounds is not None
    left, right = experiment_charts.BOUND_LEFT, experiment_charts.BOUND_RIGHT
    for group in bounds.groups:
        assert group.claimed is not None
        for row in group.rows:
            assert left + row.width < group.claimed
            assert row.control is None or left <= row.control <= right
    assert "with the noise off 7.1" in bounds.summary
    for chart in experiment_charts.roc_charts(report):
        assert chart.ceiling is not None
        for line in [*chart.curves, experiment_charts.Curve("", "", chart.ceiling)]:
            points = [tuple(map(float, point.split(","))) for point in line.path.split()]
            assert all(experiment_charts.ROC_LEFT <= x <= experiment_charts.ROC_RIGHT for x, _ in points)
            assert all(experiment_charts.ROC_TOP <= y <= experiment_charts.ROC_BOTTOM for _, y in points)
        assert "The promise allows 7.4 %" in chart.summary


def test_there_is_nothing_to_draw_without_experiments() -> None:
    bare = build_report(evidence(), NOW)
    assert experiment_charts.bounds_chart(bare) is None
    assert experiment_charts.roc_charts(bare) == experiment_charts.inversion_panels(bare) == []


def test_there_is_no_epsilon_chart_without_a_guarantee() -> None:
    assert charts.epsilon_chart(build_report(evidence("none"), NOW)) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (10**15, "1000.0 TB")],
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert words.size(count) == text


def test_numbers_are_written_for_people() -> None:
    assert [words.number(value) for value in ("inf", None, True, 1e-5, 1.99764, [1, 2], [], 0.0)] == [
        "no limit", "-", "yes", "0.00001", "1.998", "1, 2", "none", "0",
    ]  # fmt: skip
    assert words.odds(1e-5) == "1 in 100,000"
    assert words.odds(0.0) == "zero"
    assert words.factor(0.0) == "1.00"
    assert words.factor("inf") == "more than a million"
