"""A measurement is the same whoever works it out, and a lost worker's share is done again."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import Measurement, measure, prune_quantize
from qcompress.errors import ModelError, OptionsError
from qcompress.model.forward import default_forward
from qcompress.streaming.remeasuring import remeasure

OPTIONS = prune_quantize(bits=(3, 8), sparsity=(0,))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Hidden(nn.Module):
    """Layers of which one is hidden from autograd, so that its options are tried one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Hidden().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 6, generator=generator) for size in (5, 4, 6, 3, 5)]


def assert_same_bits(one: Measurement, other: Measurement) -> None:
    for name in ("cost", "factor", "error"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert (one.tried, one.num_samples) == (other.tried, other.num_samples)


@pytest.mark.parametrize(
    "method", ["fisher", *(pytest.param(own, marks=pytest.mark.slow) for own in ("direct", "sampled"))]
)
def test_any_number_of_processes_gives_the_same_bits(method: str) -> None:
    alone, *spread = (measure(network(), batches(), OPTIONS, method=method, jobs=jobs) for jobs in (1, 2, 4))
    assert alone.cost.any()
    for other in spread:
        assert_same_bits(alone, other)


def test_batches_do_not_depend_on_each_other() -> None:
    together = measure(network(), batches(), OPTIONS)
    later = measure(network(), [batches()[0], batches()[2]], OPTIONS)
    first = measure(network(), batches()[:1], OPTIONS)
    # the second batch's share of the whole is the same as without it, but for where probes are random: here are none
    rest = measure(network(), [batches()[0], batches()[1], *batches()[3:]], OPTIONS)
    of_second = later.cost * later.num_samples - first.cost * first.num_samples
    np.testing.assert_allclose(
        of_second, together.cost * together.num_samples - rest.cost * rest.num_samples, atol=1e-6
    )


class Killing:
    """Runs batches, and ends the process of the first worker that gets a certain one."""

    def __init__(self, flag: Path, times: int = 1) -> None:
        self.flag, self.main, self.times = str(flag), os.getpid(), times

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        done = len(list(Path(self.flag).iterdir()))
        if os.getpid() != self.main and len(batch) == 3 and done < self.times:
            Path(self.flag, str(done)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return default_forward(model, batch)


@pytest.mark.slow
def test_a_killed_workers_share_is_done_again(tmp_path: Path) -> None:
    alone = measure(network(), batches(), OPTIONS)
    flags = tmp_path / "killed"
    flags.mkdir()
    killed = measure(network(), batches(), OPTIONS, jobs=2, forward=Killing(flags))
    assert len(list(flags.iterdir())) == 1
    assert_same_bits(alone, killed)


@pytest.mark.slow
def test_workers_that_are_always_lost_are_given_up(tmp_path: Path) -> None:
    flags = tmp_path / "killed"
    flags.mkdir()
    with pytest.raises(ModelError, match="lost 4 times in a row"):
        measure(network(), batches(), OPTIONS, jobs=2, forward=Killing(flags, times=99))


@pytest.mark.slow
def test_a_cut_measurement_goes_on_in_other_processes(tmp_path: Path) -> None:
    alone = measure(network(), batches(), OPTIONS)

    def cut(progress: Any) -> None:
        if progress.batches == 3:
            raise KeyboardInterrupt

    cache = tmp_path / "sums.npz"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", -1.0)
        measure(network(), batches(), OPTIONS, cache=cache, on_progress=cut)
    assert cache.exists()
    assert_same_bits(alone, measure(network(), batches(), OPTIONS, cache=cache, jobs=2))


@pytest.mark.slow
def test_a_model_with_changed_weights_is_handed_over_with_the_original() -> None:
    model, data = network(), batches()
    measurement = measure(model, data, OPTIONS)
    alone, spread = (remeasure(model, data, measurement, [1, 1, 0], jobs=jobs) for jobs in (1, 2))
    assert_same_bits(alone, spread)


def test_what_cannot_be_handed_over_is_refused_in_words() -> None:
    model = network()
    model.held = threading.Lock()
    with pytest.raises(ModelError, match="cannot be sent to other processes.*jobs=1"):
        measure(model, batches(), OPTIONS, jobs=2)


@pytest.mark.parametrize("jobs", [0, -2, 1.5, True, "2"])
def test_jobs_are_a_number_of_processes(jobs: Any) -> None:
    with pytest.raises(OptionsError, match="jobs"):
        measure(network(), batches(), OPTIONS, jobs=jobs)


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_bits() -> None:
    joblib, distributed = pytest.importorskip("joblib"), pytest.importorskip("distributed")
    alone = measure(network(), batches(), OPTIONS)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        assert_same_bits(alone, measure(network(), batches(), OPTIONS, jobs=-1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_bits() -> None:
    joblib, ray = pytest.importorskip("joblib"), pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    alone = measure(network(), batches(), OPTIONS)
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=path)
    try:
        register_ray()
        with joblib.parallel_config(backend="ray"):
            assert_same_bits(alone, measure(network(), batches(), OPTIONS, jobs=2))
    finally:
        ray.shutdown()
