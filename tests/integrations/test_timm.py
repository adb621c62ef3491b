"""Losses of timm's training, by fused_xent's module and its sparse labels."""

import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import fused_xent

pytestmark = [
    pytest.mark.cpu("trains on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # of the framework
]
N_CLASSES = 30


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=N_CLASSES, pretrained=False).eval()


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


def compare(network, loss, wanted):
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(network, loss), gradients(network, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_label_smoothing(network):
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(N_CLASSES, (4,))
    loss = fused_xent.CrossEntropyLoss(label_smoothing=0.1)(network(images), labels)
    compare(network, loss, LabelSmoothingCrossEntropy(0.1)(network(images), labels))


def test_mixup(network):
    """Dense labels from timm's Mixup, and the same as two classes in each row."""
    labels = torch.randint(N_CLASSES, (4,))
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=N_CLASSES)
    images, dense = mixup(torch.randn(4, 3, 32, 32), labels)
    wanted = SoftTargetCrossEntropy()(network(images), dense)
    compare(network, fused_xent.CrossEntropyLoss()(network(images), dense), wanted)

    share = mixup_share(dense, labels)
    loss = fused_xent.cross_entropy(
        network(images),
        torch.tensor([share, 1 - share]).expand(4, 2),
        target_indices=torch.stack([labels, labels.flip(0)], 1),  # timm mixes with the reverse
        label_smoothing=0.1,
    )
    compare(network, loss, SoftTargetCrossEntropy()(network(images), dense))


def mixup_share(dense, labels):
    """Return the share of the first label of each image, from a row with two labels."""
    row = int((labels != labels.flip(0)).nonzero()[0])
    return (dense[row, labels[row]].item() - 0.1 / N_CLASSES) / 0.9
