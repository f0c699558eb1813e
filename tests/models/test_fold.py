"""Folding batch norms: the same function in float64, for every kind of network that has some."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import zoo
from models.class_view import ClassView
from models.features import FeatureNet
from models.fold import folded
from tests.pipeline.training.builders import TinyNet

SIZE = (3, 32, 32)


def lively(net: nn.Module) -> None:
    """Running statistics, scales and shifts as training leaves them, none of them neutral."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in ((module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0),
                                      (module.weight, 0.5, 1.5), (module.bias, -0.3, 0.3)):  # fmt: skip
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)


@pytest.mark.parametrize(
    ("name", "left"),
    [("cifar_resnet20", 0), ("cifar_vgg8", 0), ("cifar_mobilenetv2_half", 0), ("cifar_wrn_16_1", 7),
     ("test_resnet", 0), ("test_efficientnet", 0)],
)  # fmt: skip
def test_a_folded_network_is_the_same_function(name: str, left: int) -> None:
    """`left`: batch norms that stay; in pre-activation networks (wrn) some have no convolution before them."""
    torch.manual_seed(0)
    net = zoo.create_model(name, 10, image_size=32).double().eval()
    lively(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    made = folded(net, SIZE)
    assert sum(isinstance(m, _BatchNorm) for m in made.modules()) == left
    x = torch.randn(5, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        expected, found = net(x), made(x)
    for part in ("logits", "feat_2d", "feat_4d"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the network itself stays as it is"
    assert not any(p.requires_grad for p in made.parameters())


class Branching(TinyNet):
    """Uses a convolution's output twice: folding it would change the sum."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        found: torch.Tensor = self.norm(y) + y
        return found


@pytest.mark.parametrize("known", [None, [True, True, False, False]])
def test_a_network_that_cannot_be_folded_stays_as_it_is(known: list[bool] | None) -> None:
    """With its view, beside whose masked logits of -10,000 the others' errors are small."""
    net = FeatureNet(Branching()).eval()
    lively(net)
    net.show(None if known is None else ClassView(torch.arange(4), torch.tensor(known), "masked"))
    made = folded(net, SIZE)
    assert any(isinstance(module, _BatchNorm) for module in made.modules())
    x = torch.randn(5, *SIZE)
    assert torch.equal(made(x).logits, net(x).logits)
