"""GGUF files of opened models: byte for byte those of the model in memory, checked and run by llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
import torch

import qcompress
from qcompress.engines.legal import for_engine
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.llama_cpp.recipe import is_recipe
from qcompress.options import gguf_types
from tests.engines.tiny import KINDS, tiny, words
from tests.measurements import solution
from tests.quick import slow_but

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

ENGINE = LlamaCpp(threads=1)
OPTIONS = gguf_types(("Q8_0", "Q5_1", "Q4_0", "IQ4_NL"))
DATA = [words(1), words(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", slow_but(["llama"], [kind for kind in KINDS if kind != "bert"]))
def test_a_file_is_that_of_the_model_in_memory(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "model"
    tiny(kind, folder).to(dtype).save_pretrained(folder)
    opened = qcompress.open_model(folder)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    choice, files, draw = None, [], np.random.default_rng(3)
    for name, model, more in (("whole", whole, {}), ("opened", opened, {"data": DATA})):
        measurement = for_engine(ENGINE, model, qcompress.measure(model, DATA, OPTIONS, method="sampled"))
        choice = choice or solution([int(draw.integers(len(options))) for options in measurement.transforms])
        chosen = qcompress.apply(model, measurement, choice, **more)
        files.append(qcompress.export(chosen, tmp_path / f"{name}.gguf", target=ENGINE).path)
    assert files[0].read_bytes() == files[1].read_bytes()
    found = qcompress.verify(files[1], chosen, [words(3)], target=ENGINE)
    assert found.ok, found.why_not
    other = qcompress.apply(opened, measurement, solution([0] * len(measurement.parts)), data=DATA)
    assert "is not the model's" in ENGINE.check(files[1], other)


def test_a_whole_run_stays_within_its_budget(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny("llama", folder, tie_word_embeddings=False)
    data = [words(seed, samples=4) for seed in range(4)]
    engine = LlamaCpp(threads=1, recipe=str(tmp_path / "types.txt"))
    result = qcompress.compress(
        qcompress.open_model(folder), data, budget={"file_bytes": 0.4}, options=OPTIONS, method="sampled",
        target=engine, output=tmp_path / "small.gguf", folder=tmp_path / "run", memory="8 GB", time_limit=2,
    )  # fmt: skip
    assert result.verification is not None
    assert result.verification.ok, result.verification.why_not
    assert (tmp_path / "small.gguf").stat().st_size == result.verification.size_bytes
    assert is_recipe((tmp_path / "types.txt").read_bytes())
