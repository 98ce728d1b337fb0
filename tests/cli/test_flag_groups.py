"""A dataclass of flags becomes the flags of a command."""

import inspect
from dataclasses import dataclass

from qcompress.cli.flag_groups import with_flag_groups


def test_a_group_of_flags_becomes_the_flags_of_a_command():
    @dataclass(frozen=True, kw_only=True)
    class Pair:
        first: int
        second: str = "b"

    @with_flag_groups
    def command(pair: Pair, third: int = 3) -> tuple[Pair, int]:
        return pair, third

    names = inspect.signature(command).parameters
    assert {name: parameter.default for name, parameter in names.items()} == {
        "first": inspect.Parameter.empty, "second": "b", "third": 3,
    }  # fmt: skip
    assert command(first=1, second="x", third=4) == (Pair(first=1, second="x"), 4)
