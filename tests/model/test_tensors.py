"""The bytes of a tensor, whatever its strides."""

import pytest
import torch
from torch import Tensor, nn

from qcompress.measurement import Measurement
from qcompress.model.tensors import bytes_of, digest_of, same_bits

PAIR = torch.tensor([[1, 2]], dtype=torch.int16)
COMPLEX = torch.tensor([1 + 2j, 3 - 4j])


@pytest.mark.parametrize(
    ("tensor", "copy"),
    [
        (PAIR.T[:1], torch.tensor([[1]], dtype=torch.int16)),  # a single number, two apart from the next
        (torch.arange(6.0).view(2, 3).T, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])),
        (torch.ones(1).expand(3), torch.ones(3)),
        (COMPLEX.conj(), torch.tensor([1 - 2j, 3 + 4j])),
        (COMPLEX.conj().imag, torch.tensor([-2.0, 4.0])),
        (COMPLEX[:1].conj().imag, torch.tensor([-2.0])),
        (torch.tensor(True), torch.tensor(True)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
    ],
    ids=["one element", "transposed", "expanded", "conjugate", "negative", "negative element", "bool", "empty"],
)
def test_the_bytes_of_a_view_are_those_of_its_copy(tensor: Tensor, copy: Tensor) -> None:
    assert bytes(bytes_of(tensor)) == copy.numpy().tobytes()
    assert same_bits(tensor, copy)


def test_a_model_with_a_parameter_of_one_element_cut_from_another_has_the_digests_of_its_copy() -> None:
    view, copy = nn.Module(), nn.Module()
    view.weight = nn.Parameter(torch.tensor([[1.0, 2.0]]).T[:1])
    copy.weight = nn.Parameter(torch.tensor([[1.0]]))
    assert digest_of(view) == digest_of(copy)
    assert Measurement.fingerprint_of(view) == Measurement.fingerprint_of(copy)
