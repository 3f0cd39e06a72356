import pytest
import torch
from torch import nn

from ldm_train.conditioning import MaskConditioner, NoConditioner
from ldm_train.diffusion import ClassifierFreeGuidance, DDIMSampler, Denoiser, DiffusionObjective, cosine_schedule
from ldm_train.nn import UNet
from ldm_train.stages import LatentDiffusion, Original

from ..nn.test_unet import randomised
from .toy import autoencoder, batch, diffusion_parts, latent_diffusion


@pytest.fixture
def stage(monkeypatch):
    stage = latent_diffusion()
    randomised(stage.denoiser.network)
    monkeypatch.setattr(LatentDiffusion, "log", lambda *_, **__: None)
    return stage


def part(whole, rows):
    return {key: value[rows] if key != "epoch" else value for key, value in whole.items()}


def test_the_loss_does_not_depend_on_how_a_batch_is_split(stage):
    whole = stage.training_step(batch(4), 0)["loss"]
    halves = [stage.training_step(part(batch(4), rows), 0)["loss"] for rows in (slice(2), slice(2, 4))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-5, atol=1e-5)


def test_noise_differs_between_epochs_in_training_and_never_in_validation(stage):
    def loss(epoch):
        return stage.training_step(batch(epoch=epoch), 0)["loss"]

    assert loss(0) != loss(1)
    assert loss(1) == loss(1)


def test_an_image_depends_on_its_caption_and_seed_alone(stage):
    stage.eval()
    whole = batch(4)
    images = stage.generate(whole, torch.tensor([5, 6, 7, 8]))
    alone = stage.generate(part(whole, slice(2, 3)), torch.tensor([7]))
    torch.testing.assert_close(images[2:3], alone, rtol=1e-3, atol=1e-4)
    assert (images - stage.generate(whole, torch.tensor([1, 2, 3, 4]))).abs().max() > 1e-2
    other_pixels = whole | {"image": whole["image"].flip(0)}
    assert torch.equal(images, stage.generate(other_pixels, torch.tensor([5, 6, 7, 8])))


def test_guidance_scale_changes_images_and_one_is_conditional(stage):
    stage.eval()
    guided = stage.generate(batch(2), torch.tensor([0, 1]))
    stage.guidance = ClassifierFreeGuidance(1.0)
    conditional = stage.generate(batch(2), torch.tensor([0, 1]))
    stage.guidance = ClassifierFreeGuidance(0.0)
    empty = batch(2) | {"caption": ["", ""]}
    unconditional = stage.generate(batch(2), torch.tensor([0, 1]))
    assert (guided - conditional).abs().max() > 1e-3
    stage.guidance = ClassifierFreeGuidance(1.0)
    torch.testing.assert_close(unconditional, stage.generate(empty, torch.tensor([0, 1])), rtol=1e-3, atol=1e-4)


def test_the_frozen_autoencoder_gets_no_gradient_and_stays_out_of_checkpoints(stage):
    stage.train()
    assert not stage.autoencoder.training
    stage.training_step(batch(), 0)["loss"].backward()
    assert all(p.grad is None for p in stage.autoencoder.parameters())
    trained = [name for name, p in stage.named_parameters() if p.requires_grad and p.grad is None]
    assert trained == []
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    assert not any(name.startswith("autoencoder.") for name in checkpoint["state_dict"])
    other = latent_diffusion()
    other.on_load_checkpoint(checkpoint)
    assert torch.equal(other.denoiser.network.conv_in.weight, stage.denoiser.network.conv_in.weight)


def test_another_autoencoder_under_the_same_checkpoint_is_refused(stage):
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    changed = autoencoder()
    with torch.no_grad():
        changed.latent_std.mul_(1.0001)
    with pytest.raises(ValueError, match=r"another autoencoder .* change `stage.autoencoder.checkpoint`"):
        latent_diffusion(autoencoder=changed).on_load_checkpoint(checkpoint)


def test_an_uncalibrated_autoencoder_is_refused():
    with pytest.raises(RuntimeError, match="not calibrated"):
        LatentDiffusion(**(diffusion_parts() | {"autoencoder": autoencoder(calibrated=False)}))


def test_latents_are_draws_whose_mean_is_the_mode(stage):
    whole = batch(4)
    with torch.no_grad():
        stage.autoencoder.to_moments.bias[4:] += 2.0
    draws = torch.stack([stage.latents(whole | {"epoch": epoch}) for epoch in range(400)])
    stage.posterior = "mode"
    error = draws.std(dim=0) / 400**0.5
    assert ((draws.mean(dim=0) - stage.latents(whole)).abs() < 5 * error).all()
    assert torch.equal(stage.latents(whole), stage.latents(whole | {"epoch": 7}))


def test_an_unknown_posterior_is_refused():
    with pytest.raises(ValueError, match=r"change `stage.posterior`"):
        latent_diffusion(posterior="median")


def test_a_model_of_holes_is_told_the_hole_and_keeps_the_rest():
    torch.manual_seed(0)
    unet = UNet(4, 4, 16, (1, 2), 1, (2,), concat_channels=5, num_heads=2, norm_groups=8)
    parts = {"denoiser": Denoiser(unet, cosine_schedule(100), "v"), "conditioner": MaskConditioner(0, 5)}
    stage = latent_diffusion(**parts).eval()
    randomised(stage.denoiser.network)
    seen = []
    unet.register_forward_hook(lambda module, inputs, output: seen.append(inputs[2].concat))
    images, known = batch(2)["image"], torch.ones(2, 1, 16, 16)
    known[:, :, 4:9, :] = 0.0
    drawn = stage.generate(batch(2), torch.tensor([0, 1]), original=Original(images, known=known))
    mask = seen[0][-2:, 0]  # of the conditional half, first channel, at half the resolution
    assert torch.equal(mask[0].mean(1), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    assert torch.equal(drawn[:, :, :4], images[:, :, :4])
    assert torch.equal(drawn[:, :, 9:], images[:, :, 9:])
    assert not torch.equal(drawn[:, :, 4:9], images[:, :, 4:9])


def test_an_original_given_up_wholly_is_no_original(stage):
    stage.eval()
    seeds, other = torch.tensor([0, 1]), batch(2, first=7)["image"]
    plain = stage.generate(batch(2), seeds)
    assert torch.equal(plain, stage.generate(batch(2), seeds, original=Original(other, strength=1.0)))
    little = stage.generate(batch(2), seeds, original=Original(other, strength=0.25))
    reconstructed = stage.autoencoder.decode(stage.autoencoder.encode(other)).clamp(-1, 1)
    assert (little - reconstructed).abs().mean() < (plain - reconstructed).abs().mean()


def test_every_state_on_the_way_is_shown(stage):
    stage.eval()
    states = []
    image = stage.generate(batch(1), torch.tensor([3]), watch=states.append)
    assert [state.step for state in states] == [1, 2, 3, 4]
    assert states[-1].t == -1
    assert torch.equal(stage.autoencoder.decode(states[-1].x_t).clamp(-1, 1), image)


def test_losses_are_unweighted_in_what_callbacks_see(stage):
    found = stage.training_step(batch(4), 0)
    assert found["t"].shape == found["square_error"].shape == (4,)
    torch.testing.assert_close(found["loss"], found["square_error"].mean())  # of a uniform weighting


def test_compiling_in_place_keeps_names_and_loss(stage, monkeypatch):
    monkeypatch.setattr(UNet, "compile", lambda self: nn.Module.compile(self, backend="aot_eager"))
    compiled = latent_diffusion(compile_network=True)
    compiled.load_state_dict(stage.state_dict())  # strict: the same names
    found, expected = (one.training_step(batch(4), 0)["loss"] for one in (compiled, stage))
    torch.testing.assert_close(found, expected)
    assert compiled.denoiser.network._compiled_call_impl is not None


def contradicting():
    parts = diffusion_parts()
    network = parts["denoiser"].network
    learned = UNet(4, 8, 16, (1, 2), 1, (2,), context_dim=16, num_heads=2, norm_groups=8)
    return {
        "leading": {
            "denoiser": Denoiser(network, cosine_schedule(100, zero_terminal_snr=True), "v"),
            "sampler": DDIMSampler(4, spacing="leading"),
        },
        "too many steps": {"sampler": DDIMSampler(101)},
        "nothing to leave out": {
            "denoiser": Denoiser(
                UNet(4, 4, 16, (1, 2), 1, (2,), num_heads=2, norm_groups=8), cosine_schedule(100), "v"
            ),
            "conditioner": NoConditioner(),
        },
        "decoder": {
            "denoiser": Denoiser(learned, cosine_schedule(100), "v", "learned"),
            "objective": DiffusionObjective(bound_weight=0.001, decoder="discrete"),
        },
        "no bound": {"denoiser": Denoiser(learned, cosine_schedule(100), "v", "learned")},
    }


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ("leading", "sampler.spacing"),
        ("too many steps", "sampler.num_steps"),
        ("nothing to leave out", "guidance=none"),
        ("decoder", "objective.decoder"),
        ("no bound", "objective.bound_weight"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_before_a_step(parts, key):
    with pytest.raises(ValueError, match=r"allowed") as error:
        latent_diffusion(**contradicting()[parts])
    assert f"`{key}" in str(error.value)


def test_dropout_is_a_function_of_seed_epoch_and_step():
    parts = diffusion_parts()
    unet = UNet(4, 4, 16, (1, 2), 1, (2,), context_dim=16, num_heads=2, norm_groups=8, dropout=0.5)
    stage = latent_diffusion(denoiser=Denoiser(randomised(unet), parts["denoiser"].schedule, "v"))
    stage.log = lambda *_, **__: None

    def loss(epoch, batch_idx):
        torch.rand(7)  # what else the process has drawn must not matter
        return float(stage.training_step(batch(epoch=0) | {"epoch": epoch}, batch_idx)["loss"].detach())

    assert loss(0, 0) == loss(0, 0)
    assert loss(0, 0) != loss(0, 1)
