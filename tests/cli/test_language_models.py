"""`compress hf:FOLDER --text FILE`: a folder and a text in, an engine's folder, perplexity and KL out."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import qcompress
from qcompress.cli import main
from qcompress.cli.language_model import place_of, text_windows
from qcompress.errors import DataError, ModelError
from qcompress.kv_cache import cache_bytes
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.perplexity import perplexity
from qcompress.measuring.streamed.forecast import resident_bytes
from qcompress.measuring.streamed.forecast_time import forecast_seconds
from qcompress.model.opened import open_model
from qcompress.model.text import token_windows
from tests.engines.tiny import tiny
from tests.opened_models import in_memory, saved

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

SAID = "the choice of a layer is what a budget makes of all layers and no layer knows more than its own part . "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of words made on the spot, and ``text.txt`` beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("language")
    (place / "text.txt").write_text(SAID * 30)
    words = {word: number for number, word in enumerate(["?", *dict.fromkeys(SAID.split())])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(place / "model")  # noqa: S106
    return saved("Llama", place / "model").parent


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        "compress", f"hf:{folder / 'model'}", "--text", str(folder / "text.txt"), "--length", "12", "--windows", "8",
        "--budget", "bits_per_weight=5", "--bits", "3,4", "--group-size", "16", "--no-compensated", "--solver", "dp",
        "--no-pairs", "--target", "compressed-tensors", "--output", str(output), *more,
    ]  # fmt: skip


def test_a_folder_and_a_text_become_an_engines_folder_with_perplexity_and_kl(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(folder, tmp_path / "out", "--memory", "8GB", "--json")) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert "3 blocks of" in told.err
    assert "measuring takes about" in told.err
    windows = token_windows(folder / "model", folder / "text.txt", length=12, count=8)
    model, small = in_memory(folder / "model"), in_memory(tmp_path / "out")
    assert report["metric_before"] == pytest.approx(perplexity(model, windows.test), rel=1e-5)
    assert report["metric_after"] == pytest.approx(perplexity(small, windows.test), rel=1e-5)
    assert report["loss_validation"] == pytest.approx(qcompress.mean_loss(model, small, windows.validation), rel=1e-4)
    assert report["usage"]["bits_per_weight"] <= 5
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "runs" / "model" / "report.json").exists()
    summary = (tmp_path / "runs" / "model" / "summary.md").read_text()
    assert f"- perplexity: {report['metric_before']:.6g} before, {report['metric_after']:.6g} after" in summary
    assert f"on the calibration data {report['loss_measured']:.6g}" in summary
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main(command(folder, tmp_path / "out", "--memory", "8GB")) == 0  # the same again
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(command(folder, tmp_path / "out", "--memory", "8GB")) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_whose_config_names_no_architectures_is_compressed_and_read_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "text.txt").symlink_to(folder / "text.txt")
    shutil.copytree(folder / "model", tmp_path / "without" / "model")
    config = tmp_path / "without" / "model" / "config.json"
    values = json.loads(config.read_text())
    del values["architectures"]
    config.write_text(json.dumps(values))
    assert main(command(tmp_path / "without", tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    words = torch.tensor([[1, 2, 3]])
    opened = open_model(tmp_path / "without" / "model")
    assert in_memory(tmp_path / "out")(words).logits.shape == (1, 3, 61)
    assert torch.equal(opened(words).logits, in_memory(folder / "model")(words).logits)


@pytest.mark.slow
def test_a_budget_for_memory_leaves_room_for_keys_and_values(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cache, size = cache_bytes(in_memory(folder / "model"), 50), 44_000
    words = command(folder, tmp_path / "out", "--budget", f"memory={cache + size}", "--context", "50", "--json")
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["budgets"]["file_bytes"] == size
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) <= size


def to_gguf(place: Path) -> list[str]:
    """The command for a tiny model and a text in the folder ``place``, without the output."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    tiny("llama", place / "model")
    (place / "text.txt").write_text("the cat and the man " * 60)
    words = ["compress", f"hf:{place / 'model'}", "--text", "text.txt", "--length", "12", "--windows", "8"]
    return [*words, "--budget", "file_bytes=60%", "--solver", "dp", "--no-pairs", "--target", "llama.cpp"]


def test_an_engine_that_needs_the_whole_model_takes_a_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 64 weights take few of ggml's types; the others are left out, also by the forecast."""
    monkeypatch.chdir(tmp_path)
    words = to_gguf(tmp_path)
    assert main([*words, "--output", "small.gguf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (tmp_path / "small.gguf").stat().st_size == report["usage"]["file_bytes"] <= report["budgets"]["file_bytes"]
    assert report["metric_after"] == pytest.approx(report["metric_before"], rel=0.1)  # perplexity
    stored, engine = [words[1], "runs/model/model.safetensors"], ["--target", "llama.cpp"]
    assert main(["export", *stored, *engine, "--output", "again.gguf"]) == 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "small.gguf").read_bytes()
    assert main(["verify", *stored, "again.gguf", *words[2:6], *engine]) == 0
    model = open_model(tmp_path / "model")
    assert forecast_seconds(model, [torch.ones(1, 12, dtype=torch.long)], Offered.of(qcompress.gguf_types())) > 0


def test_within_a_memory_limit_a_gguf_file_is_written_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = to_gguf(tmp_path)
    assert main([*words, "--memory", "8GB", "--output", "small.gguf", "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert "2 blocks of" in said.err
    assert (tmp_path / "small.gguf").stat().st_size == report["usage"]["file_bytes"] <= report["budgets"]["file_bytes"]
    assert report["metric_after"] == pytest.approx(report["metric_before"], rel=0.1)  # perplexity


def test_a_gguf_file_is_compressed_into_a_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    size = qcompress.export(tiny("llama", tmp_path / "model"), "whole.gguf", target="llama.cpp").size_bytes
    (tmp_path / "text.txt").write_text("the cat and the man " * 60)
    words = ["gguf:whole.gguf", "--text", "text.txt", "--length", "12"]
    choice = ["--windows", "8", "--budget", "file_bytes=60%", "--solver", "dp", "--no-pairs", "--target", "llama.cpp"]
    assert main(["compress", *words, *choice, "--output", "small.gguf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (tmp_path / "small.gguf").stat().st_size == report["usage"]["file_bytes"] <= 0.6 * size
    assert (
        main(["verify", words[0], report["folder"] + "/model.safetensors", "small.gguf", *words[1:], *choice[-2:]]) == 0
    )
    of_file, of_folder = (token_windows(place, "text.txt", length=12) for place in ("whole.gguf", "model"))
    assert all(map(torch.equal, of_file.calibration, of_folder.calibration))


def test_a_damaged_gguf_file_is_named_as_such_before_its_tokenizer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    whole = qcompress.export(tiny("llama", tmp_path / "model"), "whole.gguf", target="llama.cpp").path
    content = whole.read_bytes()
    (tmp_path / "text.txt").write_text("the cat and the man " * 60)
    for length in (len(content) - 40_000, 300):  # within the tensors, and within the header
        Path("cut.gguf").write_bytes(content[:length])
        assert main(["compress", "gguf:cut.gguf", "--text", "text.txt", "--budget", "bytes=50%"]) != 0
        assert "cut.gguf is cut off or damaged" in " ".join(capsys.readouterr().err.split())


def test_a_language_model_is_measured_block_by_block(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--text", str(folder / "text.txt"), "--length", "12", "--windows", "8", "--memory", "8GB"]
    assert (
        main(["measure", f"hf:{folder / 'model'}", *words, "--bits", "4", "--sparsity", "0", "--no-compensated"]) == 0
    )
    windows = token_windows(folder / "model", folder / "text.txt", length=12, count=8).calibration
    again = qcompress.measure(
        open_model(folder / "model"), windows, qcompress.prune_quantize(bits=(4,), sparsity=(0,)), method="sampled"
    )
    assert qcompress.Measurement.load("measurement.npz").cost.tolist() == again.cost.tolist()
    assert not (tmp_path / "measurement.npz.part").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "zoo:net", "zoo:data", "--budget", "memory=2GB"], "needs --context and --target"),
        (["compress", "zoo:net", "zoo:data", "--budget", "bytes=2GB", "--context", "9"], "needs a budget for memory"),
        (
            [
                "compress",
                "zoo:net",
                "zoo:data",
                "--budget",
                "memory=2GB",
                "-b",
                "file_bytes=1GB",
                "--context",
                "9",
                "--target",
                "llama.cpp",
            ],
            "give only one of them",
        ),
        (
            ["compress", "zoo:net", "zoo:data", "-b", "memory=2m", "--context", "9", "--target", "llama.cpp"],
            "has no unit 'm'",
        ),
        (["compress", "hf:model", "--budget", "bytes=0.5"], "takes its data from --text FILE"),
        (["compress", "zoo:net", "zoo:data", "--text", "a", "--budget", "bytes=0.5"], "for MODEL hf:FOLDER or gguf"),
        (
            ["compress", "hf:", "--text", "a", "--budget", "bytes=0.5"],
            "'hf:' names nothing; give hf:FOLDER or gguf:FILE",
        ),
        (["export", "gguf:", "a", "--target", "llama.cpp"], "'gguf:' names nothing; give hf:FOLDER or gguf:FILE"),
        (["compress", "hf:nowhere", "--text", "a", "--budget", "bytes=0.5"], "there is no folder 'nowhere'"),
        (["compress", "gguf:none", "--text", "a", "--budget", "bytes=0.5"], "there is no file 'none'; gguf:FILE"),
        (["compress", "gguf:text.txt", "--text", "a", "-b", "bytes=1", "--memory", "2GB"], "here it is loaded whole"),
        (
            ["compress", "hf:m", "--text", "a", "--memory", "1GB", "-b", "bytes=0.5", "--target", "onnxruntime"],
            "here it is loaded whole",
        ),
        (["compress", "zoo:net", "--budget", "bytes=0.5"], "needs DATA"),
        (["measure", "zoo:net"], "needs DATA"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_perplexity_is_that_of_the_next_tokens(folder: Path) -> None:
    window = torch.tensor([[1, 2, 3, 4]])
    expected = torch.nn.functional.cross_entropy(in_memory(folder / "model")(window).logits[0, :-1], window[0, 1:])
    found = [perplexity(model, [window]) for model in (in_memory(folder / "model"), open_model(folder / "model"))]
    assert found == pytest.approx([float(expected.detach().exp())] * 2, rel=1e-6)


def test_windows_share_no_token_and_are_spread_over_the_text(folder: Path) -> None:
    found = token_windows(folder / "model", folder / "text.txt", length=12, count=8)
    assert [len(own) for own in (found.calibration, found.validation, found.test)] == [8, 2, 2]
    for count in (1, 2, 3, 4, 5, 7, 11, 13):
        some = token_windows(folder / "model", folder / "text.txt", length=12, count=count)
        quarter = max(count // 4, 1)
        assert [len(own) for own in (some.calibration, some.validation, some.test)] == [count, quarter, quarter]
    everything = token_windows(folder / "model", folder / "text.txt", length=12, count=10_000)
    number = len(SAID.split()) * 30 // 12
    assert len(everything.calibration) + len(everything.validation) + len(everything.test) == number


def test_memory_of_a_large_texts_tokens_is_returned(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text((SAID + " ") * (4_000_000 // len(SAID)))
    before = resident_bytes()
    windows = text_windows(folder / "model", tmp_path / "large.txt", length=12, count=8)
    assert len(windows.calibration) == 8
    assert resident_bytes() - before < 50_000_000  # several times that is needed meanwhile


def test_a_folder_without_tokenizer_or_with_a_damaged_config_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(DataError, match=r"model has no tokenizer that transformers can read \(tokenizer\.json"):
        token_windows(tmp_path / "model", folder / "text.txt", length=12)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        place_of(f"hf:{tmp_path / 'model'}")
    (tmp_path / "model" / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    with pytest.raises(ModelError, match="holds quantized weights; open the folder of the original model"):
        place_of(f"hf:{tmp_path / 'model'}")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        place_of(f"hf:{tmp_path / 'model'}")


def test_a_text_that_is_too_short_or_none_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 690 tokens, which are 5 windows of 120: .* \(at most 115 tokens\)"):
        token_windows(folder / "model", folder / "text.txt", length=120)
    for text, said in (("", "0 tokens"), ("the", "1 token"), ("the choice " * 5, "10 tokens")):
        (tmp_path / "short.txt").write_text(text)
        with pytest.raises(DataError, match=rf"has {said}, which is too little: .*windows of 12 tokens need 72\)"):
            token_windows(folder / "model", tmp_path / "short.txt", length=12)
    with pytest.raises(DataError, match="cannot be read as plain text"):
        token_windows(folder / "model", tmp_path / "none.txt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as plain text"):
        token_windows(folder / "model", tmp_path / "bytes")
