"""The page of a run: complete in itself, with every part and every warning."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from qcompress import compress, prune_quantize
from qcompress.cli import main
from qcompress.guard import Candidate
from qcompress.pages import figures, write_report_page
from qcompress.pages.report_page import report_page
from qcompress.report import Report
from solvers.sweep import sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run <1>"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [torch.randn(32, 8) for _ in range(3)]
    compress(model, data, budget={"bytes": 0.3}, options=prune_quantize(bits=(2, 4, 8)), folder=folder, seed=0)
    return folder


class Reader(HTMLParser):
    """Identifiers of elements, scripts, and addresses that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.scripts, self.fetched, self.inside = set(), [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids.add(named.get("id"))
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]
        if tag == "script":
            self.scripts.append([named.get("type"), ""])
            self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1][1] += data


def test_a_page_opens_offline_and_every_figure_has_its_place(run):
    page = Reader(write_report_page(run).read_text())
    figures = json.loads(next(text for kind, text in page.scripts if kind == "application/json"))
    assert page.fetched == []
    assert {"candidates", "bytes", "loss"} <= set(figures) <= page.ids
    assert all(any(len(trace["x"]) for trace in figure["data"]) for figure in figures.values())


def test_a_page_is_below_six_megabytes(run):
    assert write_report_page(run).stat().st_size < 6e6


def test_names_are_escaped_and_every_part_is_listed(run):
    text = write_report_page(run).read_text()
    assert "run &lt;1&gt;" in text
    assert len(re.findall(r"<tr><td class=\"words\">[02]</td>", text)) == 2


def test_what_the_run_did_besides_choosing_is_told_as_in_the_summary(run):
    report = Report.load(run / "report.json")
    rounds = tuple(Candidate(f"round {number}", 0.1, 0.2 / number, {"macs": 9.0}) for number in (1, 2))
    smallest = {"resource": "bytes", "usage": 90.0, "at_least": 80.0, "at_most": 0.1}
    told = replace(report, rounds=rounds, smallest=smallest, parts_moved=2)
    assert len(told.notes()) >= 4
    page, summary = report_page(told), told.to_markdown()
    assert all(f"<li>{html.escape(note)}</li>" in page and f"- {note}\n" in summary for note in told.notes())


def test_a_curve_of_other_budgets_adds_its_figure(run, tmp_path):
    from formulations import Problem

    curve = sweep(Problem.load(run / "problem.npz"), "bytes", 4, seed=0)
    page = Reader(write_report_page(run, tmp_path / "page.html", sweep=curve).read_text())
    assert "front" in page.ids


def test_a_loss_of_zero_at_the_loosest_budget_hides_no_other(run):
    from formulations import Problem

    curve = sweep(Problem.load(run / "problem.npz"), "bytes", 6, seed=0)
    losses = [point.solution.objective for point in curve.points]
    assert losses[-1] == 0.0
    assert losses[0] > 30 * losses[-2] > 0
    assert figures.front(curve)["layout"]["yaxis"]["type"] == "log"


def test_the_command_names_the_page(run, tmp_path, capsys):
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "page.html")]
    assert (tmp_path / "page.html").exists()


def test_a_folder_without_a_report_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "report.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_every_figure_without_a_word_on_its_console(run, tmp_path):
    page = write_report_page(run)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    place = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--enable-logging=stderr"]
    shown = subprocess.run(
        [CHROMIUM, *flags, *place, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=300
    )
    figures = json.loads(next(text for kind, text in Reader(page.read_text()).scripts if kind == "application/json"))
    assert "CONSOLE" not in shown.stderr
    assert shown.stdout.count('class="main-svg"') >= len(figures)
