"""Class images follow from the base model, the prompt and their number alone; what is there is kept."""

import errno
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_train.batch import WantedImages
from ldm_train.diffusion import ClassifierFreeGuidance, DDIMSampler, DDPMSampler
from ldm_train.stages import AutoencoderStage, LoRAFineTuning, make_class_images
from ldm_train.stages import class_images as module

from ..nn.test_unet import randomised
from .test_lora import learn
from .toy import autoencoder_stage, diffusion_parts, latent_diffusion

CPU = torch.device("cpu")
KEY = "data.mixture.class_prompt"


@pytest.fixture
def stage():
    stage = latent_diffusion()
    randomised(stage.denoiser.network)
    return stage


@pytest.fixture
def wanted(tmp_path):
    return WantedImages("red apple", 20, 16, str(tmp_path / "class"))


def pictures(wanted):
    """Name -> bytes of what lies in the folder, hidden files too."""
    return {path.name: path.read_bytes() for path in module.Path(wanted.folder).iterdir()}


def test_they_are_made_once_and_say_how(stage, wanted):
    assert make_class_images(stage, wanted, CPU, KEY) == 20
    made = pictures(wanted)
    assert sorted(made) == [f"{i:05d}.png" for i in range(20)]
    assert len(set(made.values())) == 20
    with Image.open(module.Path(wanted.folder) / "00007.png") as image:
        assert image.size == (16, 16)
        assert image.info | {"prompt": "red apple", "seed": "7", "steps": "4", "guidance": "2.0"} == image.info
    assert make_class_images(stage, wanted, CPU, KEY) == 0
    assert pictures(wanted) == made


def test_an_image_is_that_of_its_seed(stage, wanted):
    make_class_images(stage, wanted, CPU, KEY)
    group = next(iter(module.images_of(stage.eval(), 16, [module.Request("red apple", 3)], 1)))
    with Image.open(module.Path(wanted.folder) / "00003.png") as image:
        alone = group.permute(1, 2, 0).numpy().astype(int)
        assert np.abs(np.asarray(image).astype(int) - alone).max() <= 1  # sums of floats in another order


def test_what_was_interrupted_is_made_up_bit_for_bit(stage, wanted):
    make_class_images(stage, wanted, CPU, KEY)
    made = pictures(wanted)
    for i in (0, 3, 8, 9, 10, 19):
        (module.Path(wanted.folder) / f"{i:05d}.png").unlink()
    assert make_class_images(stage, wanted, CPU, KEY) == 6
    assert pictures(wanted) == made


def test_more_are_made_beside_those_that_are_there(stage, wanted, tmp_path):
    make_class_images(stage, wanted._replace(number=11), CPU, KEY)
    assert make_class_images(stage, wanted, CPU, KEY) == 9
    whole = wanted._replace(folder=str(tmp_path / "whole"))
    make_class_images(stage, whole, CPU, KEY)
    first, second = pictures(wanted), pictures(whole)
    # The last group had other members: its images may differ by rounding, the others not at all.
    assert all(first[f"{i:05d}.png"] == second[f"{i:05d}.png"] for i in [*range(8), *range(11, 20)])


def _made(queue, start, stage, wanted):
    torch.set_num_threads(1)
    start.wait()
    queue.put(make_class_images(stage, wanted, CPU, KEY))


def test_processes_share_the_work_and_change_nothing(stage, wanted, tmp_path):
    alone = wanted._replace(folder=str(tmp_path / "alone"))
    make_class_images(stage, alone, CPU, KEY)
    context = multiprocessing.get_context("fork")
    queue, start = context.Queue(), context.Barrier(3)
    processes = [context.Process(target=_made, args=(queue, start, stage, wanted)) for _ in range(3)]
    for process in processes:
        process.start()
    counts = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum(counts) == 20
    assert pictures(wanted) == pictures(alone)


def test_without_locks_they_are_made_all_the_same(stage, wanted, tmp_path, monkeypatch, caplog):
    make_class_images(stage, wanted, CPU, KEY)

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    without = wanted._replace(folder=str(tmp_path / "without"))
    assert make_class_images(stage, without, CPU, KEY) == 20
    assert "00000.lock cannot be locked" in caplog.text
    assert pictures(without) == pictures(wanted)


def test_adapters_and_modes_are_as_before(stage, wanted, tmp_path):
    content = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(content)
    torch.save(content, tmp_path / "base.ckpt")
    adapted = LoRAFineTuning(str(tmp_path / "base.ckpt"), "attention", 2, 1.0, **diffusion_parts()).train()
    learn(adapted)
    state, modes = adapted.state_dict(), [part.training for part in adapted.modules()]
    state = {name: value.clone() for name, value in state.items()}
    make_class_images(adapted, wanted, CPU, KEY)
    of_base = wanted._replace(folder=str(tmp_path / "base"))
    make_class_images(stage, of_base, CPU, KEY)
    assert pictures(wanted) == pictures(of_base)
    assert [part.training for part in adapted.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in adapted.state_dict().items())


def test_the_run_s_own_random_numbers_are_left_alone(stage, wanted):
    before = torch.random.get_rng_state()
    make_class_images(stage, wanted, CPU, KEY)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("changed", ["base", "sampler", "steps", "guidance"])
def test_images_that_were_made_otherwise_are_refused(stage, wanted, changed):
    make_class_images(stage, wanted._replace(number=2), CPU, KEY)
    before = pictures(wanted)
    if changed == "base":
        with torch.no_grad():
            next(stage.denoiser.network.parameters()).add_(1.0)
    elif changed == "guidance":
        stage.guidance = ClassifierFreeGuidance(3.0)
    else:
        stage.sampler = DDPMSampler(4) if changed == "sampler" else DDIMSampler(5)
    message = rf"00000.png was made with {changed} \w+.*, and this run has {changed} .*; allowed are images of one base"
    with pytest.raises(ValueError, match=rf"{message}.*folder {wanted.folder}, change `data.mixture.generated_dir`"):
        make_class_images(stage, wanted, CPU, KEY)
    assert pictures(wanted) == before


def test_a_whole_set_is_taken_by_a_run_that_would_sample_otherwise_but_not_with_another_base(stage, wanted):
    make_class_images(stage, wanted, CPU, KEY)
    before = pictures(wanted)
    stage.sampler, stage.guidance = DDPMSampler(5), ClassifierFreeGuidance(3.0)
    assert make_class_images(stage, wanted, CPU, KEY) == 0
    assert pictures(wanted) == before
    with torch.no_grad():
        next(stage.denoiser.network.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="was made with base"):
        make_class_images(stage, wanted, CPU, KEY)


def test_refusals_name_the_key(stage, wanted):
    make_class_images(stage, wanted._replace(number=2), CPU, KEY)
    with pytest.raises(ValueError, match=r"shows 'red apple' at 16 x 16, and 'blue car' at .*change `data.mixture"):
        make_class_images(stage, wanted._replace(prompt="blue car"), CPU, KEY)
    with pytest.raises(ValueError, match=r"'blue car' is wanted|16 x 16, and 'red apple' at 32 x 32"):
        make_class_images(stage, wanted._replace(size=32), CPU, KEY)
    (module.Path(wanted.folder) / "00001.png").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"00001.png cannot be read"):
        make_class_images(stage, wanted, CPU, KEY)
    with pytest.raises(ValueError, match=r"the text encoder takes 8 and would not see .*shorten `data.mixture"):
        make_class_images(stage, wanted._replace(prompt="a very " * 20), CPU, KEY)
    other = autoencoder_stage()
    assert isinstance(other, AutoencoderStage)
    with pytest.raises(ValueError, match=r"AutoencoderStage makes none; allowed are stages that generate"):
        make_class_images(other, wanted, CPU, KEY)
