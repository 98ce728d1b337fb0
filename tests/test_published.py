"""Tables of measurements are generated: what a page shows is what `benchmarks/published` gives, and nothing else."""

import importlib
import json
import re
from unittest import mock

import pytest

from benchmarks import pages, pictures
from benchmarks.tables import write_results


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_a_page_shows_what_the_published_rows_give(page):
    text = page.read_text()
    assert pages.with_tables(text) == text, "run: python -m benchmarks.pages"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_shows_what_the_published_rows_give(name):
    assert (pictures.FOLDER / f"{name}.svg").read_text() == pictures.drawn(name), "run: python -m benchmarks.pages"
    assert f"(pictures/{name}.svg)" in pages.PAGES[0].read_text()


def test_equal_factors_along_both_axes_draw_a_line_of_slope_one():
    picture = pictures.Picture(sources=(), x="gb", lines={"all": "s"}, labels=("GB", "s"))
    drawn = picture.svg([{"gb": 10.0, "s": 100.0}, {"gb": 1.0, "s": 10.0}, {"gb": 0.1, "s": 1.0}])
    (points,) = re.findall(r'polyline points="([^"]+)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = [map(float, point.split(",")) for point in points.split()]
    assert (x1 - x0, y1 - y0) == pytest.approx((x2 - x1, y2 - y1), abs=0.11)  # coordinates have one decimal


def test_the_benchmarks_page_has_no_table_by_hand_and_shows_every_published_one():
    text = pages.PAGES[0].read_text()
    shown = re.findall(r"<!-- table (\S+) -->", text)
    assert not re.search(r"^\|", pages.TABLE.sub("", text), re.MULTILINE)
    assert {pages.VIEWS[name].source or name for name in shown} == {file.stem for file in pages.PUBLISHED.iterdir()}


def test_every_published_table_names_a_benchmark_that_exists():
    for file in pages.PUBLISHED.iterdir():
        command = json.loads(file.read_text())["command"].split()
        assert command[:2] == ["python", "-m"]
        assert (pages.ROOT / (command[2].replace(".", "/") + ".py")).exists(), command


def test_values_across_become_columns_and_what_is_missing_a_dash():
    view = pages.View(columns={"way": "{way}"}, across="bits", cell="{kl:.1f}", where={"model": "a"})
    rows = [
        {"model": "a", "way": "x", "bits": 2.5, "kl": 1.0},
        {"model": "a", "way": "x", "bits": 4.0, "kl": 2.0},
        {"model": "b", "way": "x", "bits": 4.0, "kl": 9.0},
        {"model": "a", "way": "y", "bits": 4.0, "kl": None},
    ]
    assert view.table(rows).splitlines() == [
        "| way | 2.5 | 4 |", "| --- | --- | --- |", "| x | 1.0 | 2.0 |", "| y | – | – |",
    ]  # fmt: skip


def test_publishing_keeps_the_command_and_what_the_tables_show(tmp_path, monkeypatch):
    view = pages.View(columns={"file": "{file}"})
    monkeypatch.setattr(pages, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(pages, "VIEWS", {"sizes": view})
    monkeypatch.setattr("sys.argv", ["/benchmarks/sizes.py", "--data", "/a/place", "--samples", "3"])
    write_results(tmp_path, "sizes", [{"file": "a", "seconds": 1.0}], "")
    pages.publish(tmp_path / "sizes.json")
    published = json.loads((tmp_path / "published" / "sizes.json").read_text())
    assert published == {"command": "python -m benchmarks.sizes --data FOLDER --samples 3", "rows": [{"file": "a"}]}
    with pytest.raises(SystemExit, match="no table shows other; known: sizes"):
        pages.publish(tmp_path / "other.json")


def test_a_bench_run_publishes_only_what_the_tables_name_and_cuts_what_takes_too_long(tmp_path, monkeypatch):
    bench = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(pages, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(pages, "VIEWS", {"sizes": pages.View(columns={"file": "{file}"})})
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["/benchmarks/sizes.py"])
    write_results(tmp_path, "sizes", [{"file": "a"}], "")
    pages.publish(tmp_path / "sizes.json")
    write_results(tmp_path, "sizes", [{"file": "b"}], "")
    assert bench.publish("sizes", 0.0)
    assert json.loads((tmp_path / "published" / "sizes.json").read_text())["rows"] == [{"file": "b"}]
    assert not bench.publish("sizes", (tmp_path / "sizes.json").stat().st_mtime + 1)  # of an earlier run
    assert not bench.publish("other", 0.0)
    monkeypatch.setattr("sys.argv", ["/benchmarks/sizes.py", "--out", str(tmp_path)])
    write_results(tmp_path, "sizes", [{"file": "b"}], "")
    assert bench.publish("sizes", 0.0)
    monkeypatch.setattr("sys.argv", ["/benchmarks/sizes.py", "--quick"])
    write_results(tmp_path, "sizes", [{"file": "c"}], "")
    assert not bench.publish("sizes", 0.0)
    assert bench.run("import_time", [], 0.0).startswith("not started")
    assert bench.run("import_time", [], 0.01).startswith("stopped after")


def test_a_bench_run_uses_the_commands_of_the_tables(monkeypatch):
    bench = importlib.import_module("benchmarks.__main__")
    known = {"networks": "python -m benchmarks.networks --data FOLDER --out FOLDER --time-limit 15"}
    monkeypatch.setattr(bench, "commands", lambda: known)
    results = str(bench.RESULTS)
    assert bench.words_of("networks", "/data") == ["--data", "/data", "--time-limit", "15", "--out", results]
    assert bench.words_of("qubo", None) == []
    assert bench.words_of("prediction", "/data") == ["--data", "/data"]


@pytest.mark.parametrize("name", ["solvers_exact", "networks", "prediction", "cifar10_resnet20", "woodfisher"])
def test_the_tables_commands_parse(name):
    bench = importlib.import_module("benchmarks.__main__")
    module = importlib.import_module(f"benchmarks.{name}")
    with mock.patch("sys.argv", [name, *bench.words_of(name, "/nowhere"), "--help"]), pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
