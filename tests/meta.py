"""A device without values, `meta`, in place of a GPU from which nothing may be read in a training step.

Whatever would copy a value to the host, as `.item()`, `.tolist()`, `if tensor` and `.cpu()` do, is refused there;
what is copied to the device is not.
"""

from contextlib import nullcontext

import torch


def on_meta(batch):
    """A batch whose tensors are on it."""
    return {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def without_autocast(monkeypatch):
    """Autocast does not know the device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
