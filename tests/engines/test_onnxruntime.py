"""ONNX files: ONNX Runtime takes them, in exactly the predicted bytes, with the emulation's outputs."""

import itertools
import json
import random
from collections import UserDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompress
from benchmarks.traces import traced_once
from qcompress.compressed.record import record_of
from qcompress.engines import onnxruntime
from qcompress.engines.legal import for_engine
from qcompress.engines.onnx_sizes import ANY_OPERATORS
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.errors import EngineError
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from tests.engines.random_models import ALL, WITH_INTEGERS, network, written
from tests.measurements import Chain, measured, solution
from tests.models import Reused
from tests.quick import slow_but

EXACT = OnnxRuntime(accuracy_level=1, threads=1)
FLOAT = 1e-5  # sums in float32 in another order, outputs of size 1


def one_run(seed: int, folder: Path) -> None:
    """A random model and choice, written and run."""
    rng = random.Random(seed)  # noqa: S311
    model, batch = network(rng)
    assert written(EXACT, model, batch, ALL, rng, folder / "small.onnx").largest < FLOAT
    several_uses = ANY_OPERATORS if isinstance(model, Reused) else 0  # each has operators of its own
    assert blanks(folder / "small.onnx") <= 100 + 400 * len(list(model.modules())) + several_uses


@pytest.mark.parametrize("seed", slow_but([0, 2], range(3)))
def test_a_random_model_runs_in_the_predicted_bytes(seed: int, tmp_path: Path) -> None:
    one_run(seed, tmp_path)


@pytest.mark.slow
def test_100_random_models_run_in_the_predicted_bytes(tmp_path: Path) -> None:
    for seed in range(100, 200):
        one_run(seed, tmp_path)


def blanks(path: Path) -> int:
    """What the file is padded by."""
    import onnx

    return len(onnx.load(path).doc_string)


@pytest.mark.parametrize("options", [
    qcompress.low_rank(ratios=(0.5,), whitened=False),
    qcompress.low_rank(ratios=(0.5,), whitened=False).then(qcompress.prune_quantize((4,), group_size=16)),
    qcompress.prune_quantize(bits=(4,), group_size=(16,)),
    qcompress.prune_quantize(bits=(8,)),
])  # fmt: skip
def test_a_file_is_hardly_padded(tmp_path: Path, options: qcompress.Options) -> None:
    model = Chain(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 5)).eval()
    smaller = exported(model, torch.randn(4, 64), options, tmp_path / "small.onnx")
    low_rank = sum(isinstance(item.transform, LowRank) for item in record_of(smaller).parts)
    assert blanks(tmp_path / "small.onnx") <= 100 + 150 * low_rank


def test_clamps_of_one_integer_layer_have_room(tmp_path: Path) -> None:
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 2, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.first(x.abs())
            return self.last(sum(torch.relu(inner) * scale for scale in range(1, 11)))

    torch.manual_seed(0)
    model = Clamps().eval()
    model.first.weight.data.abs_()  # so that no clamp changes anything
    exported(model, torch.randn(2, 3, 6, 6), qcompress.integer_products(), tmp_path / "small.onnx")
    assert "Relu" not in operators(tmp_path / "small.onnx")


@pytest.mark.parametrize("room", [2, 129, 130, 131, 132, 16386, 16387, 16388])
def test_every_number_of_bytes_can_be_filled(room: int) -> None:
    """A text of 128 characters takes 2 bytes more than one of 127, and so does one of 16,384."""
    import onnx

    proto = onnx.ModelProto(opset_import=[onnx.helper.make_opsetid("", 23)])
    told = onnx.ModelProto(metadata_props=[{"key": "qcompress", "value": onnxruntime._description(proto, 4)}])
    size = proto.ByteSize() + told.ByteSize() + room
    assert len(onnxruntime._padded(proto, 4, size)) == size


def operators(path: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


def exported(model: nn.Module, batch: torch.Tensor, options: qcompress.Options, path: Path) -> nn.Module:
    """The model with the last option everywhere, written to ``path``."""
    legal = for_engine(EXACT, model, measured(model, batch, options), batch)
    smaller = qcompress.apply(model, legal, solution([len(own) - 1 for own in legal.transforms]))
    qcompress.export(smaller, path, target=EXACT, example=batch)
    return smaller


def test_linear_layers_in_blocks_are_products_in_integers_others_are_expanded(tmp_path: Path) -> None:
    model, batch = Chain(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 40)).eval(), torch.randn(3, 40)
    exported(model, batch, qcompress.prune_quantize(bits=(4,), group_size=16), tmp_path / "blocks")
    assert operators(tmp_path / "blocks").count("MatMulNBits") == 2
    exported(model, batch, qcompress.prune_quantize(bits=(4,), group_size=20), tmp_path / "odd")
    assert "MatMulNBits" not in operators(tmp_path / "odd")
    assert operators(tmp_path / "odd").count("Range") == 2


class Words(nn.Module):
    """An embedding of odd width between two layers' worth of work, whose weight is also the head if tied."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(50, 70), nn.Linear(70, 70), nn.Linear(70, 50, bias=tied)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.words(ids))))


@pytest.mark.parametrize(
    ("tied", "symmetric"),
    [(True, False), (False, True),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, True), (False, False)])],
)  # fmt: skip
def test_embeddings_are_looked_up_in_codes_that_a_tied_head_shares(tied: bool, symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Words(tied=tied).eval(), torch.randint(50, (2, 5))
    with traced_once():
        for bits, size in itertools.product((2, 4, 8), (16, 32)):
            options = qcompress.prune_quantize(bits=(bits,), group_size=size, symmetric=symmetric)
            smaller = exported(model, ids, options, tmp_path / "small.onnx")
            assert operators(tmp_path / "small.onnx").count("GatherBlockQuantized") == 1
            assert operators(tmp_path / "small.onnx").count("MatMulNBits") == 2
            output = EXACT.run(tmp_path / "small.onnx", [ids]).outputs[0]
            torch.testing.assert_close(output, smaller(ids), atol=FLOAT, rtol=0)
            fast = OnnxRuntime(threads=1)
            path = qcompress.export(smaller, tmp_path / "fast.onnx", target=fast, example=ids).path
            emulated = fast.emulate(smaller, [ids]).outputs[0]
            torch.testing.assert_close(fast.run(path, [ids]).outputs[0], emulated, atol=FLOAT, rtol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_in_8_bits_are_expanded_where_they_are_looked_up(symmetric: bool, tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(0)
    model, ids = Words(tied=False).eval(), torch.randint(50, (2, 5))
    options = qcompress.prune_quantize(bits=(8,), group_size=None, symmetric=symmetric)
    smaller = exported(model, ids, options, tmp_path / "small.onnx")
    nodes = onnx.load(tmp_path / "small.onnx").graph.node
    assert [node.op_type for node in nodes if "model.words.weight.codes" in node.input] == ["Gather"]
    output = EXACT.run(tmp_path / "small.onnx", [ids]).outputs[0]
    torch.testing.assert_close(output, smaller(ids), atol=FLOAT, rtol=0)


@pytest.mark.parametrize("ranges", ["static", "dynamic"])
def test_a_tied_head_is_multiplied_in_integers_with_the_codes_that_are_looked_up(ranges: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Words(tied=True).eval(), torch.randint(50, (2, 5))
    with traced_once():
        smaller = exported(model, ids, qcompress.integer_products((ranges,)), tmp_path / "small.onnx")
        used = operators(tmp_path / "small.onnx")
        assert used.count("DynamicQuantizeMatMul" if ranges == "dynamic" else "MatMulIntegerToFloat") == 2
        output = EXACT.run(tmp_path / "small.onnx", [ids]).outputs[0]
    torch.testing.assert_close(output, smaller(ids), atol=FLOAT, rtol=0)
    assert not torch.equal(output, model(ids))


def test_an_embedding_alone_has_no_integer_product() -> None:
    model, ids = Chain(nn.Embedding(50, 70), nn.Linear(70, 5)).eval(), torch.randint(50, (2, 5))
    counts = [len(options) for options in measured(model, ids, qcompress.integer_products()).transforms]
    assert counts == [1, 3]


def test_a_weight_that_is_looked_up_and_used_in_another_way_is_expanded(tmp_path: Path) -> None:
    class Sums(Words):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + self.words.weight.sum(1)

    torch.manual_seed(0)
    model, ids = Sums(tied=True).eval(), torch.randint(50, (2, 5))
    smaller = exported(model, ids, qcompress.prune_quantize(bits=(4,), group_size=16), tmp_path / "small.onnx")
    assert operators(tmp_path / "small.onnx").count("Range") == 1
    output = EXACT.run(tmp_path / "small.onnx", [ids]).outputs[0]
    torch.testing.assert_close(output, smaller(ids), atol=FLOAT, rtol=0)


def test_the_batch_may_be_of_any_size_and_the_file_says_what_it_was_written_for(tmp_path: Path) -> None:
    import onnx

    model, path = Chain(nn.Linear(40, 20)).eval(), tmp_path / "small.onnx"
    smaller = exported(model, torch.randn(1, 40), qcompress.prune_quantize(bits=(4,), group_size=16), path)
    for size in (1, 2, 17):
        batch = torch.randn(size, 40)
        with torch.no_grad():
            torch.testing.assert_close(EXACT.run(path, [batch]).outputs[0], smaller(batch), atol=FLOAT, rtol=0)
    held = {item.key: json.loads(item.value) for item in onnx.load(path).metadata_props}
    assert held["example"] == [[1, 40]]
    told = held["qcompress"]
    assert told["opset"] == 23
    assert told["accuracy_level"] == 1
    assert told["engine"].startswith("onnxruntime ")


def test_products_in_8_bit_integers_stay_within_their_accuracy_level(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Chain(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), torch.randn(64, 256)
    path = tmp_path / "small.onnx"
    smaller = exported(model, batch, qcompress.prune_quantize(bits=(4,), group_size=32), path)
    fast = OnnxRuntime(accuracy_level=4, threads=1)
    path = qcompress.export(smaller, tmp_path / "fast.onnx", target=fast, example=batch).path
    found = qcompress.verify(path, smaller, [batch], target=fast)
    assert found.ok
    assert found.max_difference > 0
    assert found.peak_bytes is not None
    assert found.dense_peak_bytes is not None


def test_dicts_and_lists_of_tensors_are_batches(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(40, 24), nn.Linear(24, 7)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.out((self.words(ids) * mask[..., None]).sum(1))

    model, ids, mask = Pair().eval(), torch.randint(40, (3, 6)), torch.ones(3, 6)
    for index, batch in enumerate(({"ids": ids, "mask": mask}, [ids, mask], (ids, mask), [ids, mask, torch.zeros(3)])):
        path = qcompress.export(model, tmp_path / str(index), target=EXACT, example=batch).path
        found, expected = (run([batch]).outputs[0] for run in (partial(EXACT.run, path), partial(EXACT.emulate, model)))
        torch.testing.assert_close(found, expected, atol=FLOAT, rtol=0)


class Difference(nn.Module):
    """Two inputs that must not be confused."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 5)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.out(left - 2 * right)


def test_inputs_are_called_by_their_names_whatever_their_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, left, right = Difference().eval(), torch.randn(3, 8), torch.randn(3, 8)
    expected = model(left, right)
    for index, example in enumerate(({"left": left, "right": right}, (left, right))):
        path = qcompress.export(model, tmp_path / str(index), target=EXACT, example=example).path
        session = EXACT.session(path)
        assert [entry.name for entry in session.get_inputs()] == ["left", "right"]
        assert [entry.name for entry in session.get_outputs()] == ["output"]
        for batch in ({"right": right, "left": left, "more": left}, UserDict(right=right, left=left), [left, right]):
            torch.testing.assert_close(EXACT.run(path, [batch]).outputs[0], expected, atol=FLOAT, rtol=0)
        with pytest.raises(EngineError, match=r"inputs are 'left', 'right', but 'right' is missing .* has 'left'"):
            EXACT.run(path, [{"left": left}])
        with pytest.raises(EngineError, match="'right' is missing in the batch, which has 1 tensors"):
            EXACT.run(path, [left])


def test_inputs_of_another_shape_or_type_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, image = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 2)).eval(), torch.randn(2, 3, 6, 6)
    path = qcompress.export(model, tmp_path / "small.onnx", target=EXACT, example=image).path
    for wrong in (torch.randn(2, 3, 7, 7), image.double()):
        with pytest.raises(EngineError, match=r"cannot run .* the file takes 'input' tensor\(float\)") as told:
            EXACT.run(path, [wrong])
        assert "\n" not in str(told.value)


def test_names_that_the_graph_uses_inside_stay_apart(tmp_path: Path) -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, linear: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            return self.linear(linear).tanh() - output

    torch.manual_seed(0)
    model, batch = Same().eval(), [torch.randn(2, 4), torch.randn(2, 4)]
    path = qcompress.export(model, tmp_path / "small.onnx", target=EXACT, example=batch).path
    assert [entry.name for entry in EXACT.session(path).get_inputs()] == ["linear", "output"]
    torch.testing.assert_close(EXACT.run(path, [batch]).outputs[0], model(*batch), atol=FLOAT, rtol=0)


def test_a_model_in_half_precision_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).half()
    with pytest.raises(EngineError, match=r"'0.weight' is torch.float16, but only float32 models .* model.float()"):
        qcompress.export(model, tmp_path / "x.onnx", target=EXACT, example=torch.randn(2, 4).half())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [
    qcompress.prune_quantize(bits=(4,), sparsity=(0,), group_size=(16,), symmetric=False),
    qcompress.prune_quantize(bits=(8,), sparsity=(0,)),
    qcompress.low_rank(ratios=(0.5,), whitened=False).then(qcompress.prune_quantize((8,), group_size=32)),
    qcompress.integer_products(),
])  # fmt: skip
def test_a_weight_that_differs_in_the_file_is_found_out(tmp_path: Path, options: qcompress.Options) -> None:
    """Every initializer named after a weight, with one bit changed, also those that the samples do not reach."""
    import onnx

    torch.manual_seed(0)
    model = Chain(nn.Embedding(50, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 20)).eval()
    path = tmp_path / "x.onnx"
    smaller = exported(model, torch.zeros(2, 3, dtype=torch.long), options, path)
    proto = onnx.load(path)
    assert EXACT.check(path, smaller) == ""
    weights = [item for item in proto.graph.initializer if item.name.startswith("model.layers.")]
    assert len(weights) >= 5
    for item in weights:
        content = item.raw_data
        item.raw_data = content[:-1] + bytes([content[-1] ^ 1])
        onnx.save(proto, tmp_path / "wrong.onnx")
        assert EXACT.check(tmp_path / "wrong.onnx", smaller) == f"{item.name!r} in the file is not the model's"
        item.raw_data = content


def test_what_the_engine_does_not_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    model, batch = Chain(nn.Linear(40, 20)).eval(), torch.randn(3, 40)
    (part,) = measured(model, batch, ALL).parts
    assert "no kernel for '3 bits" in EXACT.refuse(part, GroupWise(3, group_size=16))
    assert "without pruning" in EXACT.refuse(part, PruneQuantize(4, 0.5))
    assert "bfloat16 scales" in EXACT.refuse(part, GroupWise(4, scale_dtype="bfloat16"))
    assert "factors: there is no kernel" in EXACT.refuse(part, LowRank(ranks=2, then=PruneQuantize(6)))
    half = measured(model.half(), batch.half(), ALL).parts[0]
    assert "only float32 models are written" in EXACT.refuse(half, GroupWise(4))
    block = measured(model.float(), batch, ALL, granularity=10).parts[0]
    assert "block of a weight" in EXACT.refuse(block, GroupWise(4))
    with pytest.raises(EngineError, match="give example="):
        qcompress.export(model, tmp_path / "x", target=EXACT)
    (tmp_path / "wrong").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="ONNX Runtime does not accept"):
        qcompress.verify(tmp_path / "wrong", model, [batch], target=EXACT)


def test_a_model_that_pytorch_cannot_export_is_refused_in_one_line_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if float(x.sum()) > 0 else x

    with pytest.raises(EngineError, match="PyTorch cannot export Branching to ONNX: Could not guard") as raised:
        qcompress.export(Branching(), tmp_path / "x", target=EXACT, example=torch.ones(2, 4))
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


class Failing(nn.Module):
    """Raises an error of its own, always or for more than one sample."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.fc, self.most = nn.Linear(4, 4), most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise ValueError("that is too much")
        return self.fc(x)


@pytest.mark.parametrize(
    ("most", "told"),
    [
        (0, r"accept the example \(a tensor of shape \(1, 4\)\)"),
        (1, "accept the example's sample twice, which .* needs"),
    ],
)
def test_an_error_of_the_model_itself_is_not_blamed_on_the_exporter(most: int, told: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"{told}.*: ValueError: that is too much"):
        qcompress.export(Failing(most), tmp_path / "x", target=EXACT, example=torch.ones(1, 4))


def test_batches_that_only_forward_understands_are_refused_before_measuring() -> None:
    model, batches = Chain(nn.Linear(4, 4)).eval(), [{"pixels": torch.randn(2, 4)}]
    with pytest.raises(EngineError, match="does not accept .* without forward=: give batches that the model takes"):
        qcompress.compress(model, batches, budget={"bytes": 0.5}, target=EXACT, forward=lambda net, b: net(b["pixels"]))


def test_a_model_that_is_refused_anyway_is_not_told_about_forward() -> None:
    model, batches = nn.Sequential(nn.EmbeddingBag(4, 4), nn.Linear(4, 4)), [torch.zeros(2, 2, dtype=torch.long)]
    with pytest.raises(EngineError, match="EmbeddingBag") as error:
        qcompress.compress(model, batches, budget={"bytes": 0.5}, target=EXACT, forward=lambda net, b: net(b))
    assert "forward=" not in str(error.value)


@pytest.mark.parametrize("kind", [tuple, lambda pair: {"first": pair[0]}])
@pytest.mark.parametrize("forward", [None, lambda model, batch: next(iter(model(batch)))])
def test_a_model_of_several_outputs_is_refused_with_the_way_that_works(kind: Any, forward: Any) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return kind((self.fc(x), x))

    with pytest.raises(EngineError, match="the model returned (tuple|dict), .* Wrap it in a module") as raised:
        qcompress.compress(Several(), [torch.ones(2, 4)], budget={"bytes": 0.5}, target=EXACT, forward=forward)
    assert "pass forward=" not in str(raised.value)


@pytest.mark.slow
def test_a_transformer_encoder_is_exported_with_its_attention(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=64)  # fmt: skip
            self.bert = BertModel(config, add_pooling_layer=True)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]

    torch.manual_seed(0)
    model = Encoder().eval()
    batch = {"input_ids": torch.randint(40, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    legal = for_engine(EXACT, model, measured(model, batch, qcompress.prune_quantize(bits=(8,), group_size=16)), batch)
    model = qcompress.apply(model, legal, solution([len(own) - 1 for own in legal.transforms]))
    file = qcompress.export(model, tmp_path / "bert.onnx", target=EXACT, example=batch)
    assert qcompress.verify(
        file.path, model, [batch], target=EXACT, memory=False
    ).ok  # also of the pooler, which nothing reads
    path = file.path
    longer = {"input_ids": torch.randint(40, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    for other in (batch, longer):
        found, expected = EXACT.run(path, [other]).outputs[0], EXACT.emulate(model, [other]).outputs[0]
        torch.testing.assert_close(found, expected, atol=FLOAT, rtol=0)


def one_integer_run(seed: int, folder: Path) -> None:
    """A random model whose layers may multiply in integers, written and run."""
    rng = random.Random(seed)  # noqa: S311
    model, batch = network(rng)
    written(EXACT, model, batch, WITH_INTEGERS, rng, folder / "small.onnx")


@pytest.mark.parametrize("seed", slow_but([0, 1], range(3)))
def test_a_random_model_with_integer_products_gives_the_emulations_outputs(seed: int, tmp_path: Path) -> None:
    one_integer_run(seed, tmp_path)


@pytest.mark.slow
def test_100_random_models_with_integer_products(tmp_path: Path) -> None:
    for seed in range(100, 200):
        one_integer_run(seed, tmp_path)


class Rows(nn.Module):
    """Two convolutions with a clamp between them, and two Linear layers behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.hidden, self.out = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(nn.functional.relu6(self.first(x))))
        return self.out(torch.relu(self.hidden(x.mean((2, 3)))))


def test_codes_stay_codes_from_one_layer_to_the_next(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Rows().eval(), torch.randn(4, 3, 8, 8)
    smaller = exported(model, batch, qcompress.integer_products(("static",)), tmp_path / "static")
    assert operators(tmp_path / "static")[:4] == ["QuantizeLinear", "QLinearConv", "QLinearConv", "DequantizeLinear"]
    assert not {"Clip", "Conv", "Gemm"} & set(operators(tmp_path / "static"))
    assert operators(tmp_path / "static").count("MatMulIntegerToFloat") == 2
    assert qcompress.verify(tmp_path / "static", smaller, [batch], target=EXACT, memory=False).ok
    smaller = exported(model, batch, qcompress.integer_products(("dynamic",)), tmp_path / "dynamic")
    assert operators(tmp_path / "dynamic").count("DynamicQuantizeMatMul") == 2
    assert qcompress.verify(tmp_path / "dynamic", smaller, [batch], target=EXACT, memory=False).ok


def test_a_bias_far_beyond_its_weights_fits_into_whole_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Rows().eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.first.weight[:3] *= 1e-12
        model.first.weight[3] = 0
        model.first.bias[:] = 3.0
    smaller = exported(model, batch, qcompress.integer_products(("static",)), tmp_path / "small")
    assert qcompress.verify(tmp_path / "small", smaller, [batch], target=EXACT, memory=False).ok


def test_a_weight_that_is_read_otherwise_too_is_refused_by_name(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(40, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.fc.weight.sum()

    model, batch = Odd().eval(), torch.randn(3, 40)
    with pytest.raises(EngineError, match="'fc' cannot be multiplied in integers"):
        exported(model, batch, qcompress.integer_products(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
