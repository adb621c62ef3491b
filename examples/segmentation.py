"""Semantic segmentation: one class for each pixel, unlabelled pixels, rare classes.

Logits have the shape (N, C, H, W), as from torchvision, segmentation-models-pytorch or any network
of convolutions. ``CrossEntropyLoss`` replaces torch's: the kernels read the logits as they lie, the
same with ``channels_last``. Pixels of ``ignore_index`` have no label and their logits are not read.
``weight`` counts rare classes more, ``focal_gamma`` hard pixels.

The example finds discs and squares in noisy images. Run it: ``python examples/segmentation.py``.
It takes a few seconds on a CPU.
"""

import torch
from torch import Tensor, nn

from fused_xent import CrossEntropyLoss

SIZE, N_CLASSES, UNLABELLED = 32, 3, 255  # background, disc, square
WEIGHT = torch.tensor([0.3, 1.0, 1.0])


def make_batch(n_images: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, H, W) and labels (N, H, W), in which outlines are not labelled."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    centers = torch.randint(6, SIZE - 6, (n_images, 2, 2, 1, 1))
    distance = (torch.stack([y, x]) - centers).abs()  # to the centers of disc and square
    disc, square = distance[:, 0].square().sum(1).sqrt(), distance[:, 1].amax(1)
    labels = torch.where(disc < 5, 1, torch.where(square < 4, 2, 0))
    brightness = torch.tensor([0.0, 1.0, -1.0])[labels]
    images = brightness + 0.5 * torch.randn(n_images, SIZE, SIZE)
    is_outline = ((disc - 5).abs() < 0.5) | (square == 4)
    return images.unsqueeze(1), labels.masked_fill(is_outline, UNLABELLED)


def make_network() -> nn.Module:
    """Return a small network of convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, N_CLASSES, 1),
    ).to(memory_format=torch.channels_last)


def mean_iou(logits: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes of intersection over union."""
    is_labelled = labels != UNLABELLED
    found, wanted = logits.argmax(1)[is_labelled], labels[is_labelled]
    scores = []
    for i in range(N_CLASSES):
        union = ((found == i) | (wanted == i)).sum()
        scores.append(((found == i) & (wanted == i)).sum() / union.clamp(min=1))
    return torch.stack(scores).mean().item()


def main(steps: int = 60) -> tuple[float, float]:
    """Train; return the mean IoU of new images before and after."""
    torch.manual_seed(0)
    network = make_network()
    loss_function = CrossEntropyLoss(weight=WEIGHT, ignore_index=UNLABELLED, focal_gamma=1.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    images, labels = make_batch(32)

    def score() -> float:
        with torch.no_grad():
            return mean_iou(network(images), labels)

    before = score()
    for _ in range(steps):
        batch, target = make_batch(16)
        loss = loss_function(network(batch.to(memory_format=torch.channels_last)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = score()
    print(f"mean IoU of {N_CLASSES} classes: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
