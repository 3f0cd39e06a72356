"""A training step reads nothing back from its device: the next one is prepared while the device still works."""

import pytest
import torch

from ..meta import on_meta, without_autocast
from .toy import adversarial, autoencoder_stage, batch, latent_diffusion, quantizer

STAGES = {
    "latent_diffusion": latent_diffusion,
    "kl": lambda: autoencoder_stage(adversary=adversarial(r1_weight=1.0, r1_every=1)),
    "vq": lambda: autoencoder_stage(quantizer(restart_after=1), adversarial(lecam_weight=0.1)),
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_training_step_reads_nothing_back(kind, monkeypatch):
    without_autocast(monkeypatch)
    stage = STAGES[kind]()
    monkeypatch.setattr(stage, "log", lambda *_, **__: None)
    monkeypatch.setattr(stage, "log_dict", lambda *_, **__: None)
    loss_of(stage, batch()).backward()  # what is looked at once in a run
    stage.zero_grad()
    stage.to("meta")
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
    loss = loss_of(stage, on_meta(batch(epoch=1)))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
    optimizer.step()
    assert loss.is_meta
    assert sum(parameter.grad is not None for parameter in stage.parameters()) > 10
    with pytest.raises(RuntimeError):
        loss.item()  # the law has teeth


def loss_of(stage, batch):
    found = stage.training_step(batch, 0)
    return found["loss"] if isinstance(found, dict) else found
