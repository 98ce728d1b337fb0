"""``qcompress show``: reports, interrupted runs and folders of comparisons."""

import re
import sys
from pathlib import Path

from formulations.generators.random_instances import layered_problem
from qcompress.cli import main
from tests.cli.zoo import COMPRESS, ran


def test_show_reads_reports_cut_runs_and_folders_of_comparisons(folder, problem_file, monkeypatch, capsys):
    def cut(*given, **named):
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["qcompress.steps.choosing"], "solve", cut)
        assert main([*COMPRESS, "--output", "run"]) == 1
    capsys.readouterr()
    ran(["show", "run"])
    lines = capsys.readouterr().out
    assert "the same command resumes it" in lines
    assert re.search(r"measure +[\d.]+ s +done", lines)
    assert re.search(r"solve +[\d.]+ s +not finished", lines)
    ran([*COMPRESS, "--output", "run"])
    told = capsys.readouterr().out
    for shown in ("run", "run/report.json"):
        ran(["show", shown])
        assert capsys.readouterr().out == told
    ran(["compare", problem_file, "--solver", "greedy", "--seeds", "1", "--output", "compared"])
    told = capsys.readouterr().out
    ran(["show", "compared"])
    assert capsys.readouterr().out == told
    (folder / "else").mkdir()
    assert main(["show", "else"]) == 1
    assert "else is not a folder written by 'compress' or 'compare'; it contains nothing" in capsys.readouterr().err


def test_a_summary_is_read_as_it_was_written_whatever_the_locale(folder, monkeypatch, capsys):
    ran([*COMPRESS, "--output", "run"])
    told = capsys.readouterr().out
    monkeypatch.setattr(Path, "read_text", reading_as_latin_1)
    ran(["show", "run"])
    assert capsys.readouterr().out == told


def reading_as_latin_1(path, encoding=None, errors=None):
    """What `Path.read_text` does where the locale's encoding is not UTF-8."""
    return path.read_bytes().decode(encoding or "latin-1", errors or "strict")


def test_a_solution_is_not_shown_with_another_problem(problem_file, capsys):
    ran(["solve", problem_file, "--solver", "greedy", "--output", "solution.json"])
    layered_problem(4, seed=2).save("other.npz")
    capsys.readouterr()
    assert main(["show", "solution.json", "--problem", "other.npz"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "belongs to another problem" in shown.err


def test_show_tells_which_runs_a_journal_holds_without_changing_it(problem_file, folder, capsys):
    solvers = ["--solver", "greedy", "--solver", "brute-force", "--seeds", "2"]
    ran(["compare", problem_file, *solvers, "--journal", "j.jsonl"])
    cut = (folder / "j.jsonl").read_bytes()[:-20]
    (folder / "j.jsonl").write_bytes(cut)
    capsys.readouterr()
    ran(["show", "j.jsonl"])
    lines = capsys.readouterr().out
    assert re.search(r"greedy +2 ", lines)
    assert re.search(r"brute-force +1 ", lines)
    assert (folder / "j.jsonl").read_bytes() == cut
    (folder / "j.jsonl").write_bytes(cut.replace(b'"solver"', b'"solved"').replace(b'"label"', b'"name"'))
    assert main(["show", "j.jsonl"]) == 1
    assert "j.jsonl is not a complete qcompress journal file" in capsys.readouterr().err


def test_files_for_other_programs_are_told_apart_from_damaged_ones(problem_file, capsys):
    ran(["compare", problem_file, "--solver", "greedy", "--seeds", "1", "--output", "compared"])
    capsys.readouterr()
    assert main(["show", "compared/runs.csv"]) == 1
    assert "compared/runs.csv is for spreadsheets" in capsys.readouterr().err
