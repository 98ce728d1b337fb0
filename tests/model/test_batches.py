"""Batches are taken apart whatever kind of mapping they are."""

from collections import UserDict

import torch

from qcompress.model.batches import as_float32, samples


def test_any_mapping_is_split_into_its_samples() -> None:
    batch = UserDict({"x": torch.arange(6).view(3, 2), "flag": True})
    found = list(samples(batch))
    assert [own["x"].tolist() for own in found] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(own["flag"] is True for own in found)


def test_half_precision_is_widened_in_any_nesting_and_nothing_else_is() -> None:
    half = torch.ones(2, dtype=torch.float16)
    whole = torch.ones(2, dtype=torch.int64)
    found = as_float32([UserDict({"a": half}), (whole, "text")])
    assert found[0]["a"].dtype == torch.float32
    assert found[1][0] is whole
    assert found[1][1] == "text"


def test_what_holds_no_half_precision_is_returned_itself() -> None:
    whole = UserDict({"ids": torch.ones(2, dtype=torch.int64), "more": (torch.ones(2), ["text"])})
    assert as_float32(whole) is whole
    assert isinstance(as_float32((torch.ones(1).half(), 3)), tuple)
