"""The flags that enable options: they mean what the library calls the same."""

import inspect
from typing import get_type_hints

import pytest

from qcompress import low_rank, prune_channels, prune_quantize
from qcompress.cli import main
from qcompress.cli.offering import OfferFlags
from qcompress.options import SPARSITY, SPARSITY_IN_GROUPS
from tests.cli.zoo import MEASURE

FACTORS = low_rank(ranks=(4, 8), kinds=("channels", "sliced"), slices=(2,), whitened=True)


RANKED = ["--ranks", "4,8", "--kinds", "channels,sliced", "--slices", "2", "--factor-bits", "3,4"]


BITS = prune_quantize(compensated=True)


OFFERED = [
    ([], BITS),
    (["--compensated"], BITS),
    (["--no-compensated"], prune_quantize()),
    (["--bits", "4", "--sparsity", "0,0.5"], prune_quantize(bits=(4,), sparsity=(0, 0.5), compensated=True)),
    (["--low-rank"], BITS + low_rank(whitened=True)),
    (["--no-whitened"], BITS + low_rank(whitened=False)),
    (["--ratios", "0.25,0.5"], BITS + low_rank(ratios=(0.25, 0.5), whitened=True)),
    (["--no-prune-quantize", "--energies", "0.9"], low_rank(energies=(0.9,), whitened=True)),
    (["--no-prune-quantize", "--kinds", "tucker, channels"], low_rank(kinds=("tucker", "channels"), whitened=True)),
    (["--no-prune-quantize", "--no-whitened"], low_rank(whitened=False)),
    (
        ["--no-prune-quantize", *RANKED],
        FACTORS + FACTORS.then(prune_quantize(bits=(3, 4), sparsity=(0,), compensated=True)),
    ),
    (
        ["--no-prune-quantize", "--no-compensated", *RANKED],
        FACTORS + FACTORS.then(prune_quantize(bits=(3, 4), sparsity=(0,))),
    ),
    (
        ["--no-whitened", "--no-compensated", "--factor-bits", "8", "--factor-sparsity", "0,0.5"],
        prune_quantize()
        + low_rank(whitened=False)
        + low_rank(whitened=False).then(prune_quantize(bits=(8,), sparsity=(0, 0.5))),
    ),
    (
        ["--bits", "3,4", "--group-size", "32,64", "--asymmetric"],
        prune_quantize(bits=(3, 4), group_size=(32, 64), symmetric=False, compensated=True),
    ),
    (["--channels"], prune_channels()),
    (
        ["--channels", "--bits", "4,8", "--sparsity", "0"],
        prune_channels() + prune_quantize(bits=(4, 8), sparsity=(0,), compensated=True),
    ),
    (["--channels", "--low-rank"], prune_channels() + low_rank()),
    (
        ["--keep", "0.5", "--bits", "4,8", "--sparsity", "0", *RANKED],
        prune_channels(keep=(0.5,))
        + prune_quantize(bits=(4, 8), sparsity=(0,), compensated=True)
        + FACTORS
        + FACTORS.then(prune_quantize(bits=(3, 4), sparsity=(0,), compensated=True)),
    ),
    (
        ["--channels", "--kinds", "channels", "--factor-bits", "4", "--no-compensated"],
        prune_channels()
        + low_rank(kinds=("channels",))
        + low_rank(kinds=("channels",)).then(prune_quantize(bits=(4,), sparsity=(0,))),
    ),
    (["--keep", "0.5,0.25", "--channel-block", "4"], prune_channels(keep=(0.5, 0.25), granularity=4)),
]


def help_of(flag):
    """The help of one of the flags that enable options."""
    return get_type_hints(OfferFlags, include_extras=True)[flag].__metadata__[0].help


@pytest.mark.parametrize(
    ("function", "name"),
    [(prune_quantize, "bits"), (low_rank, "kinds"), (low_rank, "slices")],
)
def test_the_help_names_the_librarys_defaults(function, name):
    default = inspect.signature(function).parameters[name].default
    text = help_of(name)
    words = ",".join(value if isinstance(value, str) else f"{value:g}" for value in default)
    assert text.endswith(f"Default: {words}.")


def test_the_help_names_the_librarys_sparsity():
    text = help_of("sparsity")
    shares, grouped = (",".join(f"{share:g}" for share in each) for each in (SPARSITY, SPARSITY_IN_GROUPS))
    assert text.endswith(f"Default: {shares}; with groups {grouped}.")


@pytest.mark.parametrize(("words", "options"), OFFERED, ids=[" ".join(words) for words, _ in OFFERED])
@pytest.mark.parametrize("command", [MEASURE[:3], ["compress", *MEASURE[1:3], "--budget", "bytes=0.5"]])
def test_words_put_on_offer_what_the_library_calls_the_same(command, words, options, monkeypatch):
    passed = {}

    class EnoughError(Exception):
        pass

    def keep(*given, **named):
        passed.update(named, options=given[2] if len(given) > 2 else named["options"] or BITS)
        raise EnoughError

    monkeypatch.setattr("qcompress.measure", keep)
    monkeypatch.setattr("qcompress.compress", keep)
    with pytest.raises(EnoughError):
        main([*command, *words, "--debug"])
    assert passed["options"] == options


@pytest.mark.parametrize("command", [MEASURE[:3], ["compress", *MEASURE[1:3], "--budget", "bytes=0.5"]])
def test_patterns_of_layers_go_to_the_library_as_they_are(command, monkeypatch):
    passed = {}
    monkeypatch.setattr("qcompress.measure", lambda *given, **named: passed.update(named))
    monkeypatch.setattr("qcompress.compress", lambda *given, **named: passed.update(named))
    main([*command, "--skip", "0, *.norm*", "--only", "2"])
    assert (passed["skip"], passed["only"]) == (["0", "*.norm*"], ["2"])
