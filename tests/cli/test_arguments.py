"""Words of the form name=value."""

import pytest

from qcompress.cli import arguments


@pytest.mark.parametrize(
    ("word", "value"),
    [("a=1", 1), ("a=1_000", 1000), ("a=0.5", 0.5), ("a=1e-3", 1e-3), ("a=True", True), ("a=None", None),
     ("a=cbc", "cbc"), ("a='2'", "2"), ("a=b=c", "b=c"), ("a=[1]", [1]), ("a=-3", -3),
     ("a=((0, 0), (20, 1))", ((0, 0), (20, 1)))],
)  # fmt: skip
def test_values_are_literals_or_words(word, value):
    assert arguments.assignments([word], "--option") == {"a": value}
