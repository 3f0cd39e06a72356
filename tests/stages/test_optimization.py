import pytest
import torch

from ldm_train.stages import warmup_constant, warmup_cosine
from ldm_train.stages.optimization import clip_groups, optimizers, trainable


def rates(schedule, steps, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, **arguments)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_is_linear_and_then_constant():
    assert rates(warmup_constant, 6, warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_cosine_ends_at_its_final_factor_and_is_half_way_in_the_middle():
    found = rates(warmup_cosine, 105, warmup_steps=2, total_steps=102, final_factor=0.1)
    assert found[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert found[52] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert found[102:] == pytest.approx([0.2] * 3)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"change `trainer.max_steps` or `lr_scheduler.warmup_steps`"):
        rates(warmup_cosine, 1, warmup_steps=5, total_steps=5)


def test_frozen_parameters_are_not_optimised():
    module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    module[0].requires_grad_(False)
    built = optimizers(trainable(module), torch.optim.AdamW, None)["optimizer"]
    assert built.param_groups[0]["params"] == list(module[1].parameters())


@pytest.mark.parametrize("algorithm", ["norm", "value", None])
def test_each_group_is_clipped_as_if_it_were_alone(algorithm):
    def gradients(*groups):
        parameters = [[torch.nn.Parameter(torch.zeros(3)) for _ in range(2)] for _ in groups]
        for group, scale in zip(parameters, groups, strict=True):
            for i, parameter in enumerate(group):
                parameter.grad = scale * torch.arange(1.0, 4.0) * (i + 1)
        clip_groups(torch.optim.SGD([{"params": group} for group in parameters], lr=1.0), 1.0, algorithm)
        return [torch.cat([parameter.grad for parameter in group]) for group in parameters]

    large, small = gradients(1000.0, 0.01)
    assert torch.equal(large, gradients(1000.0)[0])
    torch.testing.assert_close(small, 0.01 * torch.tensor([1.0, 2, 3, 2, 4, 6]))  # below the limit: left alone
    assert float(large.norm() if algorithm != "value" else large.max()) == pytest.approx(1.0, rel=1e-4)
