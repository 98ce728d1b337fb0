"""Batch norms become a part of the layer before them where that changes nothing."""

import torch
from torch import Tensor, nn

import qcompress
from tests.measurements import Mixed


def lively(model: nn.Module) -> nn.Module:
    """Batch norms with statistics that matter."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def test_outputs_stay_and_the_original_is_left_alone() -> None:
    model, batch = lively(Mixed()), torch.randn(4, 3, 6, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = qcompress.fold_batch_norms(model, batch)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(batch), model(batch), atol=1e-5, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_norm_stays_whose_layer_is_read_elsewhere_or_called_twice() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    class Twice(Both):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.norm(self.conv(x))))

    for kind in (Both, Twice):
        model, batch = lively(kind()), torch.randn(2, 3, 4, 4)
        folded = qcompress.fold_batch_norms(model, batch)
        assert isinstance(folded.norm, nn.BatchNorm2d)
        with torch.no_grad():
            assert torch.equal(folded(batch), model(batch))
