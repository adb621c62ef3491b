"""A network of segmentation-models-pytorch has the same gradients with CrossEntropyLoss."""

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import fused_xent

pytestmark = [
    pytest.mark.cpu("trains on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # of the framework
]
UNLABELLED = 255


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unet(memory_format, smoothing):
    network = smp.Unet("resnet18", encoder_weights=None, classes=5).eval()
    network = network.to(memory_format=memory_format)
    images = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.randint(5, (2, 32, 32))
    labels[:, :4] = UNLABELLED
    weight = torch.tensor([0.2, 1.0, 1.0, 2.0, 1.0])
    losses = [
        cls(weight=weight, ignore_index=UNLABELLED, label_smoothing=smoothing)(
            network(images), labels
        )
        for cls in (fused_xent.CrossEntropyLoss, nn.CrossEntropyLoss)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, list(network.parameters())) for loss in losses]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_soft_cross_entropy():
    """smp's own loss, with label smoothing and an ignored class."""
    logits = torch.randn(2, 5, 8, 8)
    labels = torch.randint(5, (2, 8, 8))
    labels[:, :2] = UNLABELLED
    own = smp.losses.SoftCrossEntropyLoss(
        smooth_factor=0.1, ignore_index=UNLABELLED, reduction="sum"
    )
    loss = fused_xent.CrossEntropyLoss(
        label_smoothing=0.1, ignore_index=UNLABELLED, reduction="sum"
    )
    torch.testing.assert_close(loss(logits, labels), own(logits, labels), rtol=1e-4, atol=1e-4)
