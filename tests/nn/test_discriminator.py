import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_train.distributed import all_reduce_sum
from ldm_train.nn import HINGE, NON_SATURATING, GlobalBatchNorm2d, PatchDiscriminator
from tests.ranks import run_ranks


def _images(count, size, seed=0, dtype=torch.float32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def _logits(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).requires_grad_()


class TestPatchDiscriminator:
    @pytest.mark.parametrize(("num_layers", "parameters"), [(3, 2_765_633), (2, 663_361)])
    def test_published_parameter_counts(self, num_layers, parameters):
        with torch.device("meta"):
            discriminator = PatchDiscriminator(64, num_layers)
        assert sum(p.numel() for p in discriminator.parameters()) == parameters

    @pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
    def test_a_logit_sees_its_patch_and_nothing_else(self, num_layers, patch):
        x = _images(1, 128).requires_grad_()
        logits = PatchDiscriminator(4, num_layers, norm="none")(x)
        assert logits.shape[-1] == 128 // 2**num_layers - 2
        middle = logits.shape[-1] // 2
        (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
        seen = gradient[0].abs().sum(0) > 0
        rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
        assert int(rows.max() - rows.min()) + 1 == patch
        assert int(columns.max() - columns.min()) + 1 == patch

    def test_the_smallest_image_is_one_patch(self):
        discriminator = PatchDiscriminator(4, 2, norm="none")
        assert discriminator(_images(1, 12)).shape == (1, 1, 1, 1)
        with pytest.raises(ValueError, match=r"11 x 12, too small .* 2 layers; allowed are 12 x 12 .*num_layers`"):
            discriminator(_images(1, 12)[:, :, 1:])

    @torch.no_grad()
    def test_initial_weights(self):
        torch.manual_seed(0)
        layers = PatchDiscriminator(32, 3).layers
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                assert float(layer.weight.mean()) == pytest.approx(0.0, abs=2e-3)
                assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.1)
            elif isinstance(layer, nn.BatchNorm2d):
                assert float(layer.weight.mean()) == pytest.approx(1.0, abs=0.01)
                assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.3)

    def test_spectral_norm_bounds_every_layer(self):
        torch.manual_seed(0)
        discriminator = PatchDiscriminator(8, 2, norm="spectral")
        x = _images(2, 16)
        for _ in range(50):  # each forward pass in training refines the estimate
            discriminator(x)
        for layer in discriminator.layers[::2]:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1.0, rel=1e-2)

    @pytest.mark.parametrize(("norm", "independent"), [("batch", False), ("spectral", True), ("none", True)])
    def test_only_batch_norm_mixes_the_examples_of_a_batch(self, norm, independent):
        discriminator = PatchDiscriminator(8, 2, norm)
        x = _images(3, 16).requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x)[0].sum(), x)
        assert bool((gradient[1:] == 0).all()) == independent

    @pytest.mark.parametrize(
        ("change", "key"), [({"channels": 0}, "channels"), ({"num_layers": 0}, "num_layers"), ({"norm": "x"}, "norm")]
    )
    def test_impossible_shapes_are_refused(self, change, key):
        with pytest.raises(ValueError, match=rf"allowed are .*change.*`adversarial\.discriminator\.{key}`"):
            PatchDiscriminator(**change)


class TestAdversarialForms:
    def test_hinge(self):
        real, fake = _logits(0.5, 2.0, -1.0), _logits(-2.0, 0.5, 0.0)
        loss = HINGE.discriminator(real, fake)
        assert loss.item() == pytest.approx(0.5 * ((0.5 + 0 + 2) / 3 + (0 + 1.5 + 1) / 3))
        loss.backward()
        assert real.grad.flatten().tolist() == pytest.approx([-1 / 6, 0, -1 / 6])
        assert fake.grad.flatten().tolist() == pytest.approx([0, 1 / 6, 1 / 6])
        assert HINGE.generator(fake).item() == pytest.approx(1.5 / 3)

    def test_non_saturating_is_a_cross_entropy(self):
        real, fake = _logits(0.5, 2.0, -1.0), _logits(-2.0, 0.5, 0.0)
        entropy = F.binary_cross_entropy_with_logits
        expected = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))
        torch.testing.assert_close(NON_SATURATING.discriminator(real, fake), expected)
        torch.testing.assert_close(NON_SATURATING.generator(fake), entropy(fake, torch.ones_like(fake)))

    @pytest.mark.parametrize(("form", "value"), [(HINGE, 1.0), (NON_SATURATING, math.log(2.0))])
    def test_a_discriminator_that_knows_nothing(self, form, value):
        assert form.discriminator(_logits(0.0), _logits(0.0)).item() == pytest.approx(value)


def _norms():
    """Our normalisation and torch's, of the same weights, in float64."""
    torch.manual_seed(1)
    theirs = nn.BatchNorm2d(4).double()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = GlobalBatchNorm2d(4).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _features(count):
    generator = torch.Generator().manual_seed(2)
    offset = 30 * torch.randn(1, 4, 1, 1, generator=generator, dtype=torch.float64)
    return torch.randn(count, 4, 3, 5, generator=generator, dtype=torch.float64) + offset


def _gradients(norm, x):
    """Output, and the gradients of a loss with a penalty on its own gradient, as R1 is."""
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view_as(x[:1])
    y = norm(x)
    (first,) = torch.autograd.grad((torch.tanh(y) * weights).sum(), x, create_graph=True)
    (y.pow(3).sum() + first.square().sum()).backward()
    return {"y": y.detach(), "first": first.detach(), "x": x.grad}, {"w": norm.weight.grad, "b": norm.bias.grad}


def test_global_batch_norm_of_one_process_is_torch_s():
    ours, theirs = _norms()
    for found, expected in zip(_gradients(ours, _features(6)), _gradients(theirs, _features(6)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(ours.eval()(_features(2)), theirs.eval()(_features(2)), rtol=0, atol=0)


def _one_rank(rank, init_file, world):
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    x = _features(6)
    part = slice(0, 2) if rank == 0 else slice(2, 6)  # ranks with unequal batches
    ours, theirs = _norms()
    of_examples, of_weights = _gradients(ours, x[part])
    expected_of_examples, expected_of_weights = _gradients(theirs, x)
    torch.testing.assert_close(of_examples, {name: value[part] for name, value in expected_of_examples.items()})
    torch.testing.assert_close({name: all_reduce_sum(value) for name, value in of_weights.items()}, expected_of_weights)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_global_batch_norm_of_two_ranks_is_torch_s_on_the_joined_batch(tmp_path):
    run_ranks(_one_rank, tmp_path / "rendezvous", 2)
