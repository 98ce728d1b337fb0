"""What a language model cannot take is one clear line, before anything is computed; what it will take is told."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from qcompress.cli import main
from qcompress.errors import DataError
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.streamed.forecast_memory import forecast_memory
from qcompress.model.losses import as_loss
from qcompress.model.opened import open_model
from qcompress.model.text_limits import require_positions
from qcompress.options import Options, prune_quantize
from tests.engines.tiny import write_tokenizer
from tests.opened_models import saved, tokens

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

OPENING = "qcompress.open_model"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat and the man " * 200)
    return tmp_path


def language_model(kind: str, **more: object) -> str:
    """A tiny model with a tokenizer of 265 tokens, as ``hf:FOLDER``."""
    write_tokenizer(saved(kind, Path(kind), **{"vocab_size": 320, **more}))
    return f"hf:{kind}"


def told(words: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    capsys.readouterr()
    assert main(words) == code
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def commands(model: str, *more: str) -> list[list[str]]:
    words = [model, "--text", "text.txt", *more]
    return [["compress", *words, "-b", "bytes=50%"], ["measure", *words]]


def never(*given: object, **named: object) -> None:
    raise AssertionError("a model was opened")


@pytest.mark.parametrize(
    ("kind", "limit", "name"),
    [
        ("GPT2", {"n_positions": 32}, "n_positions"),
        ("OPT", {"max_position_embeddings": 32}, "max_position_embeddings"),
    ],
)
def test_windows_of_more_tokens_than_positions_are_refused(
    here: Path, kind: str, limit: dict[str, int], name: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = language_model(kind, **limit)
    monkeypatch.setattr(OPENING, never)
    for words in commands(model, "--length", "33"):
        assert f"longer than the 32 positions of {kind} ({name} of its" in told(words, capsys, 1)


@pytest.mark.parametrize(
    ("config", "allowed"),
    [
        (transformers.LlamaConfig(max_position_embeddings=32), None),  # rotary: computed for any position
        (transformers.GPTJConfig(n_positions=32), None),
        (transformers.BloomConfig(), None),
        (transformers.MptConfig(max_seq_len=32), 32),
        (transformers.RobertaConfig(max_position_embeddings=34, pad_token_id=1), 32),
        (transformers.BertConfig(max_position_embeddings=32), 32),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_positions_of_a_model_are_known_by_its_kind(config: Any, allowed: int | None) -> None:
    require_positions(config, Path("folder"), allowed or 10_000)
    if allowed is not None:
        with pytest.raises(DataError, match=f"longer than the {allowed} positions of folder"):
            require_positions(config, Path("folder"), allowed + 1)


def test_a_tokenizer_of_another_model_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model("Llama", vocab_size=61)
    monkeypatch.setattr(OPENING, never)
    for words in commands(model, "--length", "8"):
        assert "but the model's vocabulary ends at 60" in told(words, capsys, 1)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_an_encoder_with_a_decoder_is_refused_with_plain_text(
    here: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """T5 does not run on one text; Bart does, but predicts each token from itself."""
    import transformers

    small = {"d_model": 16, "vocab_size": 320}
    getattr(transformers, f"{kind}Config")(**small, architectures=[f"{kind}ForConditionalGeneration"]).save_pretrained(
        kind
    )
    write_tokenizer(Path(kind))
    for words in commands(f"hf:{kind}", "--length", "8"):
        assert f"{kind} is an encoder-decoder model ({kind.lower()}), which plain text is" in told(words, capsys, 1)


def test_a_batch_that_an_opened_model_does_not_accept_is_named(here: Path) -> None:
    language_model("GPT2", n_positions=8)
    offered = Offered.of(prune_quantize(bits=(4,), sparsity=(0,)), skip=(), only=None)
    with pytest.raises(DataError, match=r"does not accept a sample of batch 0 \(.*\(1, 9\)\): IndexError"):
        forecast_memory(open_model("GPT2"), [tokens(1, 9)], offered, as_loss("kl"))


@pytest.mark.parametrize("method", ["direct", "fisher"])
def test_a_method_that_needs_the_whole_model_is_refused_for_a_folder_read_by_block(
    here: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands("hf:anything", "--method", method):
        assert f"--method {method} needs the model in memory" in told(words, capsys, 2)


def test_a_method_is_honoured_where_the_model_is_loaded_whole(here: Path) -> None:
    import qcompress

    model = language_model("Llama")
    words = [
        "measure",
        model,
        "--text",
        "text.txt",
        "--length",
        "8",
        "--windows",
        "4",
        "--bits",
        "4",
        "--sparsity",
        "0",
    ]
    for method, expected in (([], "sampled"), (["--method", "fisher"], "fisher")):
        assert main([*words, "--sparsity", "0", "--no-compensated", "--latency", *method]) == 0
        assert qcompress.Measurement.load("measurement.npz").method == expected


def test_the_help_says_what_the_default_method_is(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("compress", "measure"):
        assert main([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "Default: fisher; for hf:FOLDER and gguf:FILE sampled" in text
        assert "[default: fisher]" not in text


@pytest.mark.parametrize("command", ["compress", "measure"])
def test_time_and_memory_are_told_before_measuring(
    here: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model("Llama")
    monkeypatch.setattr(f"qcompress.{command}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    words = next(words for words in commands(model, "--length", "8", "--windows", "4") if words[0] == command)
    said = told(words, capsys, 130)
    assert "3 blocks of" in said
    assert "4 windows of 8 tokens" in said
    assert re.search(r"measuring takes about [\d,]+ s and needs about", said)
    assert "GB of memory" in said


def test_the_memory_told_grows_with_the_model_and_is_what_a_limit_is_compared_with(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qcompress
    from qcompress.errors import OptionsError

    for module in ("measure", "forecast_memory"):  # memory of the process changes while other tests' garbage is freed
        monkeypatch.setattr(f"qcompress.measuring.streamed.{module}.resident_bytes", lambda: 10**9)
    offered = prune_quantize(bits=(4,), sparsity=(0,))

    def needed(options: Options, **more: int) -> int:
        language_model("Llama", **more)
        model = open_model("Llama")
        return forecast_memory(model, [tokens(1, 8)], Offered.of(options, skip=(), only=None), as_loss("kl"))

    small, large = needed(offered), needed(offered, intermediate_size=200_000)
    assert large - small > 36 * 32 * 190_000  # to encode a matrix
    with pytest.raises(OptionsError, match="but about .* are needed") as refused:
        qcompress.measure(open_model("Llama"), [tokens(1, 8)], offered, method="sampled", memory=large // 2)
    assert " 0 for" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--memory", "lots"], 1, "memory must be an amount with its unit"),
        (["--memory", "8GB", "--target", "compressed-tensors", "--output", "nowhere/small"], 1, "nowhere"),
        (["--memory", "8GB", "--target", "compressed-tensors", "--output", "full"], 1, "full is not empty"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_model_is_opened(
    here: Path, more: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = language_model("Llama")
    (here / "full").mkdir()
    shutil.copy("text.txt", "full")
    monkeypatch.setattr(OPENING, never)
    assert message in told(commands(model, "--length", "8", *more)[0], capsys, code)


@pytest.mark.parametrize(
    "words",
    [
        ["measure", "zoo:a", "zoo:b"], ["export", "zoo:a", "a.safetensors", "--target", "llama.cpp"],
        ["apply", "zoo:a", "m.npz", "s.json"], ["finetune", "zoo:a", "a.safetensors", "zoo:b"],
        ["formulate", "m.npz", "-b", "bytes=1"], ["solve", "p.npz"], ["sweep", "p.npz"], ["report", "run"],
    ],
)  # fmt: skip
def test_a_folder_that_is_not_there_is_told_before_anything_runs(
    here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no folder 'nowhere' for out" in told([*words, "--output", "nowhere/out"], capsys, 2)


@pytest.mark.parametrize(
    "words",
    [
        ["measure", "zoo:a", "zoo:b"], ["apply", "zoo:a", "m.npz", "s.json"],
        ["finetune", "zoo:a", "a.safetensors", "zoo:b"], ["formulate", "m.npz", "-b", "bytes=1"], ["solve", "p.npz"],
        ["sweep", "p.npz"], ["sweep", "p.npz", "--plot", "there"], ["report", "run"],
    ],
)  # fmt: skip
def test_a_folder_where_a_file_would_be_is_told_before_anything_runs(
    here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "there").mkdir()
    words = words if "--plot" in words else [*words, "--output", "there"]
    assert "'there' is a folder: name a file" in told(words, capsys, 2)


def test_a_file_where_a_folder_would_be_is_told_before_anything_runs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "there").touch()
    told_of = told(["compare", "p.npz", "--output", "there"], capsys, 2)
    assert "'there' is a file: name a folder" in told_of
