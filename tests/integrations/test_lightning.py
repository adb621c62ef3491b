"""A LightningModule trains with CrossEntropyLoss as with torch's."""

import lightning
import pytest
import torch
from torch import nn

import fused_xent

pytestmark = [
    pytest.mark.cpu("trains on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # of the framework
]


class Classifier(lightning.LightningModule):
    def __init__(self, loss_function):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 50))
        self.loss_function = loss_function
        self.losses = []

    def training_step(self, batch, batch_index):
        inputs, target = batch
        loss = self.loss_function(self.layers(inputs), target)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def train(loss_function, **options):
    torch.manual_seed(1)
    inputs = torch.randn(64, 8)
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] * 20).long().clamp(-25, 24) + 25)
    module = Classifier(loss_function)
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    return torch.tensor(module.losses)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-4), ({"precision": "bf16-mixed"}, 3e-2), ({"accumulate_grad_batches": 2}, 1e-4)],
)
def test_training(options, tolerance):
    wanted = train(nn.CrossEntropyLoss(label_smoothing=0.1), **options)
    found = train(fused_xent.CrossEntropyLoss(label_smoothing=0.1), **options)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert found[-4:].mean() < found[:4].mean() - 0.2


def test_module_in_a_checkpoint(tmp_path):
    """The loss has no state of its own, but class weights: state dicts carry over."""
    weight = torch.rand(50)
    own, other = nn.CrossEntropyLoss(weight), fused_xent.CrossEntropyLoss(torch.ones(50))
    other.load_state_dict(own.state_dict())
    assert torch.equal(other.weight, weight)
