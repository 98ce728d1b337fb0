"""Which tests are quick: recorded processor seconds choose what ``pytest --fast`` runs.

    pytest --record-durations      run the tests and write the seconds of the slower ones to durations.json
    pytest --fast                  run the quickest tests that together took `FAST_S` seconds, and all unrecorded ones

Processor time, children included, does not depend on what else the machine does.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parent / "durations.json"
RECORDED_S = 0.05
"""Tests that take less are not recorded, and always run."""

FAST_S = 12.0
"""Two cores, of which each also imports everything once, then end within two minutes."""

PROPERTY = "processor_s"


def within(durations: Mapping[str, float], total: float) -> set[str]:
    """The quickest tests that together take at most ``total`` seconds.

    >>> sorted(within({"a": 3.0, "b": 1.0, "c": 2.0}, 4.0))
    ['b', 'c']
    """
    chosen, used = set(), 0.0
    for name, seconds in sorted(durations.items(), key=lambda item: (item[1], item[0])):
        used += seconds
        if used > total:
            break
        chosen.add(name)
    return chosen


def recorded() -> dict[str, float]:
    """Test → processor seconds, of the slower ones."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"the quickest tests, {FAST_S:g} s of processor time in all")
    parser.addoption("--record-durations", action="store_true", help=f"write the durations to {FILE.name}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    durations = recorded()
    left_out = durations.keys() - within(durations, FAST_S)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append((PROPERTY, sum(os.times()[:4]) - before))


class Recorder:
    """Collects what the workers measured and writes it at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] = dict(report.user_properties).get(PROPERTY, 0.0)

    def pytest_sessionfinish(self) -> None:
        write(self.seconds)


def write(seconds: Mapping[str, float]) -> None:
    """Write the slower tests, one a line."""
    kept = {name: round(value, 2) for name, value in sorted(seconds.items()) if value >= RECORDED_S}
    FILE.write_text(json.dumps(kept, indent=0, ensure_ascii=False) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())
