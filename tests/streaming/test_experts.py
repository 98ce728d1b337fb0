"""Opened mixtures of experts: stored with a tensor per expert or with one for all, measured, chosen, written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompress
from qcompress.errors import ModelError
from qcompress.model.opened import open_model, opened_of
from tests.opened_models import in_memory, saved, tokens

OPTIONS = qcompress.prune_quantize(bits=(3, 4), group_size=16)
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 11},  # 10 comes after 9
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                 "shared_expert_intermediate_size": 16},
}  # fmt: skip


def data() -> list[torch.Tensor]:
    return [tokens(2, 9, seed=1), tokens(3, 9, seed=2)]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as transformers writes it: with tensors for each expert."""
    return saved(request.param, tmp_path_factory.mktemp(request.param), **KINDS[request.param])


def by_part(measurement: qcompress.Measurement) -> list[np.ndarray]:
    """The costs of each part's options."""
    sizes = [len(options) for options in measurement.transforms]
    return np.split(measurement.cost, np.cumsum(sizes)[:-1])


def fused(folder: Path, to: Path) -> Path:
    """The same model with one tensor for all experts."""
    whole = in_memory(folder)
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({name: tensor.clone() for name, tensor in whole.state_dict().items()}, to / "model.safetensors")
    return to


def test_both_forms_give_the_outputs_of_the_model_in_memory(folder: Path, tmp_path: Path) -> None:
    assert any(".experts.0." in name for name in load_file(folder / "model.safetensors"))
    expected = in_memory(folder)(tokens(2, 9)).logits
    for stored in (folder, fused(folder, tmp_path / "fused")):
        opened = open_model(stored)
        assert torch.equal(opened(tokens(2, 9)).logits, expected)


def test_experts_are_measured_and_chosen_as_in_memory(folder: Path) -> None:
    opened, whole = open_model(folder), in_memory(folder)
    found, expected = (qcompress.measure(model, data(), OPTIONS, method="sampled") for model in (opened, whole))
    assert [part.name for part in found.parts] == [part.name for part in expected.parts]
    assert 1 - found.fixed["bytes"] / found.original["bytes"] > 0.98
    # experts that no sample reaches are tried in memory, without effect; in an opened model they stay as they are
    costs = [by_part(measurement) for measurement in (found, expected)]
    for known, whole_cost in zip(*costs, strict=True):
        np.testing.assert_allclose(known, whole_cost[: len(known)], rtol=1e-5, atol=1e-12)
        assert len(known) == len(whole_cost) or not whole_cost.any()
    solution = qcompress.solve(qcompress.formulate(found, {"bytes": 0.25}, pairs=False), "dp")
    smaller = qcompress.apply(opened, found, solution)
    loss = qcompress.mean_loss(opened, smaller, data())
    assert loss > 0
    decoded, source = in_memory(folder), opened_of(smaller)
    assert source is not None
    decoded.load_state_dict({name: source.read(name) for name in decoded.state_dict()})
    assert loss == pytest.approx(qcompress.mean_loss(whole, decoded, data()), rel=1e-5)


def test_a_run_writes_a_folder_that_gives_the_chosen_weights(folder: Path, tmp_path: Path) -> None:
    result = qcompress.compress(
        open_model(folder), data(), budget={"bits_per_weight": 4.2}, options=OPTIONS, method="sampled",
        target="compressed-tensors", output=tmp_path / "out", guard=False, pairs=False, solver="dp",
    )  # fmt: skip
    assert result.verification is not None
    assert (result.verification.ok, result.verification.max_difference) == (True, 0.0)


def test_what_needs_a_model_in_memory_says_so(tmp_path: Path) -> None:
    opened = open_model(saved("Llama", tmp_path))
    measurement = qcompress.measure(opened, data(), OPTIONS, method="sampled")
    problem = qcompress.formulate(measurement, {"bytes": 0.3}, pairs=False)
    solution = qcompress.solve(problem, "dp")
    smaller = qcompress.apply(opened, measurement, solution)
    for name, call in {
        "finetune": lambda: qcompress.finetune(smaller, data(), 1, teacher=opened),
        "apply_": lambda: qcompress.apply_(opened, measurement, solution),
        "save_compressed": lambda: qcompress.save_compressed(smaller, tmp_path / "small.qc"),
        "pack_": lambda: qcompress.pack_(smaller),
    }.items():
        with pytest.raises(ModelError, match=f"{name} needs a model in memory, and this one is read block by block"):
            call()


def test_a_form_that_is_not_read_tensor_by_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    missing = next(name for name in tensors if ".experts.1." in name)
    del tensors[missing]
    tmp_path.joinpath("config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="do not fit together|has the shape"):
        open_model(tmp_path)(tokens(1, 4))
