"""Linear layers, their loss with and without fusion, and the memory layouts of the logits."""

import torch
import torch.nn.functional as F

from fused_xent import _linear, _products, linear_cross_entropy

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, H, C = 11, 9, 37  # rows, features, classes


def in_chunks(monkeypatch):
    monkeypatch.setattr(_linear, "CPU_ROWS", 4)
    monkeypatch.setattr(_linear, "GPU_ROWS", 4)


def by_classes(monkeypatch):
    """Store logits class by class, in two blocks: there are a few more rows than features."""
    monkeypatch.setattr(
        _linear, "_is_by_classes", lambda inputs: inputs.needs[1] and len(inputs.classes) == 1
    )
    monkeypatch.setattr(_products, "SLAB_BYTES", 400)


def make_layer(dtype=torch.float32, rows=(N,), classes=(C,), n_features=H, bias=True):
    """Return leaves: hidden states, layer weight and bias, scaled for logits of about 1."""
    hidden = torch.randn(*rows, n_features)
    layer = [hidden, torch.randn(*classes, n_features) * n_features**-0.5]
    layer += [torch.randn(classes)] if bias else []
    return [x.to(dtype).requires_grad_() for x in layer]


def unfused(loss_function, layer, target, **options):
    """Compute all logits, then their loss."""
    hidden, linear_weight, *bias = layer
    flat = [x.flatten(0, -2) for x in (linear_weight,)] + [b.flatten() for b in bias]
    logits = F.linear(hidden, *flat).reshape(*hidden.shape[:-1], *linear_weight.shape[:-1])
    return loss_function(logits, target, **options)


def fused(layer, target, **options):
    hidden, linear_weight, *bias = layer
    options |= {"linear_bias": bias[0]} if bias else {}
    return linear_cross_entropy(hidden, linear_weight, target, **options)


def gradients_of(loss, leaves, upstream=None):
    return torch.autograd.grad(loss, leaves, upstream)


def make_target(soft=False, dtype=torch.float32, n_rows=N, n_classes=C):
    if soft:
        return torch.randn(n_rows, n_classes).softmax(1).to(dtype)
    target = torch.randint(n_classes, (n_rows,))
    target[1::4] = -100
    return target


def doubled(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]
