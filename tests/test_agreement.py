"""Whom a compression changes."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.agreement import Agreement, agreement


def networks():
    generator = torch.Generator().manual_seed(0)
    original, other = nn.Linear(6, 4), nn.Linear(6, 4)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for parameter, first in zip(other.parameters(), original.parameters(), strict=True):
            parameter.copy_(first + 0.2 * torch.randn(parameter.shape, generator=generator))
    data = [torch.randn(50, 6, generator=generator) for _ in range(3)]
    return original, other, data


def test_every_changed_sample_is_counted_once_in_its_margin_and_its_class():
    original, other, data = networks()
    found = agreement(original, other, data)
    outputs = torch.cat([original(batch) for batch in data]), torch.cat([other(batch) for batch in data])
    changed = outputs[0].argmax(1) != outputs[1].argmax(1)
    assert found.samples == 150
    assert found.changed == int(changed.sum()) > 0
    assert sum(group.changed for group in found.by_margin) == found.changed
    for group in found.by_class:
        of_class = outputs[0].argmax(1) == group.label
        assert (group.samples, group.changed) == (int(of_class.sum()), int((changed & of_class).sum()))
    assert [group.share for group in found.by_class] == sorted((group.share for group in found.by_class), reverse=True)


def test_margins_are_those_of_log_probabilities_and_ascend():
    original, other, data = networks()
    groups = agreement(original, other, data).by_margin
    first, second = torch.cat([original(batch) for batch in data]).log_softmax(1).topk(2).values.T
    margins = np.sort((first - second).detach().numpy())
    assert groups[0].low == pytest.approx(margins[0], rel=1e-5)
    assert groups[-1].high == pytest.approx(margins[-1], rel=1e-5)
    assert all(left.high <= right.low for left, right in itertools.pairwise(groups))


def test_what_the_original_is_unsure_of_changes_first():
    assert agreement(*networks()).tail_ratio > 2


def test_what_is_saved_is_loaded(tmp_path):
    found = agreement(*networks())
    found.save(tmp_path / "agreement.json")
    assert Agreement.load(tmp_path / "agreement.json") == found


@pytest.mark.parametrize("classes", [1])
def test_outputs_that_are_no_classes_are_refused(classes):
    model = nn.Linear(3, classes)
    with pytest.raises(ValueError, match="two classes or more"):
        agreement(model, model, [torch.zeros(2, 3)])


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="no data"):
        agreement(nn.Linear(2, 2), nn.Linear(2, 2), [])


def test_models_in_training_mode_are_compared_in_evaluation_mode_and_stay_as_they_are() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)) for _ in range(2)]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    data = [torch.randn(32, 4)]
    found = agreement(models[0], models[1], data)
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        model.eval()
    with torch.no_grad():
        first, second = (model(data[0]).argmax(1) for model in models)
    assert found.changed == int((first != second).sum())
