import contextlib
import re

import hydra
import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from ldm_train import config
from ldm_train.config import ConfigError, build, check, conf_dir, explain_override, plain
from ldm_train.secrets import secrets_in_clear
from ldm_train.train import train

from .conftest import composed, filled

# Groups that change other groups instead of describing a part, and those in which nothing is built.
OVERLAYS = ("experiment", "sweep", "debug", "shapes")
PLACES = ("paths", "hydra")
# A text-to-image model: every part of it can be exchanged for another option of its group.
PARTS = [
    "stage=latent_diffusion",
    "unet=tiny",
    "conditioner=text",
    "schedule=cosine",
    "objective=simple",
    "sampler=ddim",
    "guidance=classifier_free",
]
ONE_SLURM_TASK = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1"} | dict.fromkeys(
    ("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID"), "0"
)


def options(*groups):
    return [(group, path.stem) for group in groups for path in sorted((conf_dir() / group).glob("*.yaml"))]


def names(group):
    return [option for _, option in options(group)]


GROUPS = sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name not in (*OVERLAYS, *PLACES))


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


@pytest.fixture
def built(monkeypatch):
    """The parts of the run that were built, by name."""
    seen, original = [], config._instantiate
    monkeypatch.setattr(
        config, "_instantiate", lambda node, key, **given: seen.append(key) or original(node, key, **given)
    )
    return seen


def check_and_build(cfg):
    check(cfg)
    return build(cfg)


@pytest.fixture
def refusal(built, tmp_path):
    """The message with which a config is refused; no Trainer, hence no device, has been touched then."""

    def refuse(*overrides, runs=None, nothing_built=False):
        cfg = composed(*overrides, root=runs or tmp_path)
        with pytest.raises(ConfigError) as refused:
            check_and_build(cfg)
        assert "trainer" not in built
        assert not (nothing_built and built)
        return str(refused.value)

    return refuse


# Begins from a finished autoencoder, which is that of the demo here.
BEGINS_FROM_ANOTHER = {"autoencoder_decoder": ["autoencoder=tiny"]}


@pytest.fixture(scope="module")
def tiny_ldm_512(tmp_path_factory):
    """A checkpoint of `ldm_512` in its small shape, for what is built on it."""
    root = tmp_path_factory.mktemp("ldm_512")
    shared = ["experiment=ldm_512", "debug=tiny", "data=emoji", "logger=csv", "callbacks.samples=null"]
    train(composed(*shared, "trainer.max_steps=1", "trainer.val_check_interval=null", root=root))
    return root / "ldm_512/default/checkpoints/last.ckpt"


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_is_accepted_and_builds(experiment, tiny_runs, tiny_ldm_512, torch_cache):
    overrides = [f"experiment={experiment}", "trainer.accelerator=cpu", "logger=csv"]
    if experiment in BEGINS_FROM_ANOTHER:
        begun = tiny_runs / "demo_autoencoder/default/checkpoints/last.ckpt"
        overrides += [*BEGINS_FROM_ANOTHER[experiment], f"stage.autoencoder.checkpoint={begun}"]
    if experiment in names("shapes/tiny"):  # accepted as it is, built in a small shape
        check(filled(composed(*overrides, root=tiny_runs), tiny_runs))
        overrides += ["debug=tiny"]
    if experiment == "dreambooth":
        overrides += [f"stage.base_checkpoint={tiny_ldm_512}"]
    cfg = filled(composed(*overrides, root=tiny_runs), tiny_runs)
    run = check_and_build(cfg)
    assert run.trainer.max_steps == cfg.trainer.max_steps
    assert any(parameter.requires_grad for parameter in run.stage.parameters())


@pytest.mark.parametrize("experiment", names("experiment"))
@pytest.mark.parametrize("debug", names("debug"))
def test_every_experiment_can_be_debugged(debug, experiment, tiny_runs, tmp_path):
    check(filled(composed(f"experiment={experiment}", f"debug={debug}", root=tmp_path), tiny_runs))


@pytest.mark.parametrize("sweep", names("sweep"))
def test_every_sweep_is_over_keys_that_exist(sweep, tmp_path):
    """Of the experiment in the command that its file begins with."""
    head = (conf_dir() / "sweep" / f"{sweep}.yaml").read_text(encoding="utf-8")
    experiment = re.search(rf"^# python -m ldm_train -m (experiment=\w+) sweep={sweep}\b", head, re.M)[1]
    check(composed(experiment, f"sweep={sweep}", root=tmp_path))
    cfg = composed(experiment, f"sweep={sweep}", root=tmp_path, return_hydra_config=True)
    assert cfg.hydra.sweeper.params
    assert all(OmegaConf.select(cfg, key) is not None for key in cfg.hydra.sweeper.params)


@pytest.mark.parametrize(("group", "option"), options(*GROUPS))
def test_every_option_of_every_group_is_accepted_and_builds(
    group, option, tiny_runs, tmp_path, torch_cache, monkeypatch
):
    if (group, option) == ("trainer", "slurm"):
        for name, value in ONE_SLURM_TASK.items():
            monkeypatch.setenv(name, value)
    parts = [part for part in PARTS if not part.startswith(f"{group}=")]
    cfg = filled(composed(*parts, f"{group}={option}", root=tmp_path), tiny_runs)
    check(cfg)
    given = {"logger": False} if group == "trainer" else {}
    # The networks may be of any size: shapes without memory.
    with torch.device("meta") if group in ("autoencoder", "unet", "conditioner") else contextlib.nullcontext():
        part = hydra.utils.instantiate(cfg[group], _convert_="all", **given)
    assert not contains_config(part)


def test_published_networks_have_their_published_sizes():
    cfg = composed(*PARTS, "autoencoder=kl_f8", "unet=sd1", "conditioner.context_dim=768")
    with torch.device("meta"):
        networks = [hydra.utils.instantiate(cfg[group]) for group in ("autoencoder", "unet")]
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert sizes == [83_653_863, 859_520_964]


def contains_config(part):
    """Whether something was left as it stands in the config."""
    return isinstance(part, DictConfig) or (isinstance(part, dict) and any(map(contains_config, part.values())))


def test_the_resolved_config_survives_as_plain_values(tiny_runs):
    cfg = composed("experiment=demo_lora", root=tiny_runs)
    assert composed("experiment=demo_lora", root=tiny_runs) == cfg
    check(OmegaConf.create(plain(cfg)))


def with_shards(monkeypatch, *overrides):
    monkeypatch.setenv("SECRET_NAME", "SECRET_OF_ENVIRONMENT")
    return composed("experiment=demo_autoencoder", "data=webdataset", *overrides)


def test_a_record_of_the_config_holds_no_secrets(monkeypatch):
    cfg = with_shards(
        monkeypatch,
        "data.shards=['https://me:SECRET@h/{0..3}.tar?X-Amz-Signature=SECRET','s3://b/1.tar','/d/?.tar',"
        "'https://h/a b.tar?sig=SECRET C']",
        "data.storage_options={s3: {key: '${oc.env:SECRET_NAME}', secret: 12345678901, endpoint_url: 'https://e', "
        "anon: false, profile: null}}",
    )
    kept = plain(cfg)["data"]
    assert kept["shards"] == ["https://h/{0..3}.tar?...", "s3://b/1.tar", "/d/?.tar", "https://h/a b.tar?..."]
    hidden = {"key": "...", "secret": "...", "endpoint_url": "https://e", "anon": False, "profile": None}
    assert kept["storage_options"] == {"s3": hidden}
    assert cfg.data.storage_options.s3.key == "SECRET_OF_ENVIRONMENT"  # the run has it
    check(OmegaConf.create(plain(cfg)))


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("data.shards='https://h/a.tar?token=${oc.env:SECRET_NAME}'", []),
        ("data.shards='https://me:${oc.env:SECRET_NAME}@h/a.tar?version=3'", []),
        ("data.shards=['s3://b/0.tar','https://h/a.tar?sig=SECRET']", ["data.shards"]),
        ("data.val_shards='https://me:SECRET@h/a.tar'", ["data.val_shards"]),
        ("data.storage_options={s3: {key: '${oc.env:SECRET_NAME}', client_kwargs: {region_name: here}}}", []),
        ("data.shards='https://h/a b.tar?sig=SECRET'", ["data.shards"]),
        ("data.storage_options={s3: {secret: SECRET}}", ["data.storage_options.s3.secret"]),
        ("data.storage_options={s3: {key: 7777777, connection_timeout: 60}}", ["data.storage_options.s3.key"]),
    ],
)
def test_secrets_in_clear_are_told_from_names_of_variables(monkeypatch, override, keys):
    assert secrets_in_clear(with_shards(monkeypatch, override)) == keys


def test_a_variable_that_is_not_set_is_named_with_its_key(refusal):
    message = refusal("experiment=demo_autoencoder", "data.shards='https://h/a?token=${oc.env:NO_SUCH_VARIABLE}'")
    assert "`data.shards` has no value: " in message
    assert "'NO_SUCH_VARIABLE' not found\"; set what it refers to, or change `data.shards`" in message


@pytest.mark.parametrize(
    ("override", "key", "meant", "home"),
    [
        ("+unet.chanels=64", "unet.chanels", "unet.channels", "conf/unet/"),
        ("+sampler.steps=9", "sampler.steps", "sampler.num_steps", "conf/sampler/"),
        ("+trainer.max_step=9", "trainer.max_step", "trainer.max_steps", "conf/trainer/"),
        ("+callbacks.ema.decai=1", "callbacks.ema.decai", "callbacks.ema.decay", "conf/callbacks/"),
        ("+stage.denoiser.predict=v", "stage.denoiser.predict", "stage.denoiser.prediction", "conf/stage/"),
        ("+optimizer.beta=1", "optimizer.beta", "optimizer.betas", "conf/optimizer/"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(refusal, override, key, meant, home):
    message = refusal("experiment=demo", override, nothing_built=True)
    assert f"`{key}` is unknown" in message
    assert f"did you mean `{meant}`?" in message
    assert f"see {home}" in message
    assert meant.rpartition(".")[2] in message.partition("allowed are")[2]


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("unet.channels=wide", "unet.channels", "int"),
        ("unet.channels=1.5", "unet.channels", "int"),
        ("unet.channel_multipliers=2", "unet.channel_multipliers", "Sequence"),
        ("unet.num_res_blocks=[1,2]", "unet.num_res_blocks", "int"),
        ("data.flip=1", "data.flip", "bool"),
        ("sampler.spacing=even", "sampler.spacing", "leading"),
        ("stage.denoiser.prediction=noise", "stage.denoiser.prediction", "epsilon"),
        ("stage.denoiser.network.module={channels:64}", "stage.denoiser.network.module", "Module"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(refusal, override, key, allowed):
    message = refusal("experiment=demo", override, nothing_built=True)
    assert f"`{key}` is " in message
    assert allowed in message.partition(" takes ")[2]
    assert f"see conf/{key.partition('.')[0]}/" in message


def test_all_missing_keys_are_listed_at_once(refusal):
    message = refusal("stage=lora", *PARTS[1:], "data=webdataset", nothing_built=True)
    for key in ("name", "data.shards", "stage.autoencoder.checkpoint", "stage.base_checkpoint"):
        assert f"`{key}` has no value; give it one: `{key}=...`" in message


def test_a_missing_part_is_named(refusal):
    message = refusal("experiment=demo", "~unet.channel_multipliers", "~unet.in_channels", nothing_built=True)
    assert "`unet.in_channels` is missing; ldm_train.nn.UNet needs it" in message
    assert "channel_multipliers" not in message  # it has a default


def test_an_unknown_task_is_refused(refusal):
    message = refusal("experiment=demo", "task=sample", nothing_built=True)
    assert "task is 'sample'; allowed are fit and validate; change `task`" in message


def test_epsilon_with_zero_terminal_snr_is_refused(refusal, tiny_runs):
    overrides = ["schedule=scaled_linear", "schedule.zero_terminal_snr=true", "stage.denoiser.prediction=epsilon"]
    message = refusal("experiment=demo", *overrides, runs=tiny_runs)
    assert "allowed there are v and x_0" in message
    assert "stage.denoiser.prediction=v" in message
    assert "schedule.zero_terminal_snr=false" in message


def test_a_context_of_another_width_is_refused(refusal, tiny_runs):
    message = refusal("experiment=demo", "unet.context_dim=64", runs=tiny_runs)
    assert "the conditioner gives context_dim 192, the network takes context_dim 64" in message
    assert "change `conditioner.context_dim` or `unet.context_dim`" in message


@pytest.mark.parametrize(
    ("overrides", "found", "remedy"),
    [
        (
            ["experiment=demo", "unet.in_channels=3", "unet.out_channels=3"],
            "latent_channels 6, the network takes in_channels 3",
            "unet.in_channels",
        ),
        (["experiment=demo", "unet.vector_dim=7"], "vector_dim 192, the network takes vector_dim 7", "unet.vector_dim"),
        (
            ["experiment=demo_inpaint", "unet.concat_channels=0"],
            "concat_channels 7, the network takes concat_channels 0",
            "conditioner.concat_channels",
        ),
        (
            ["experiment=demo_inpaint", "conditioner.concat_channels=3"],
            "concat_channels",
            "conditioner.concat_channels",
        ),
        (["experiment=demo", "stage.denoiser.variance=learned"], "learned", "unet.out_channels"),
        (["experiment=demo", "objective=hybrid", "objective.bound_weight=0"], "bound_weight", "objective.bound_weight"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(refusal, tiny_runs, overrides, found, remedy):
    message = refusal(*overrides, runs=tiny_runs)
    assert found in message
    assert "allowed" in message
    assert f"`{remedy}`" in message


def test_an_uncalibrated_autoencoder_is_refused(refusal, tiny_runs, tmp_path):
    checkpoint = torch.load(tiny_runs / "demo_autoencoder/default/checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["autoencoder.latent_std"].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "uncalibrated.ckpt")
    message = refusal("experiment=demo", f"stage.autoencoder.checkpoint={tmp_path / 'uncalibrated.ckpt'}")
    assert "not calibrated" in message
    assert "`stage.autoencoder.checkpoint`" in message


def test_an_absent_first_stage_is_refused(refusal):
    message = refusal("experiment=demo")
    assert "no checkpoint at" in message
    assert "train that stage first, or change `stage.autoencoder.checkpoint`" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("unet.chanels=3", "did you mean `unet.channels`?); allowed are in_channels, "),
        ("foo=3", "`foo` is unknown to the config; allowed are "),
        ("callbacks.emma.decay=1", "did you mean `callbacks.ema`?); allowed are "),
        ("stage.denoiser.network.module.channels=3", "`stage.denoiser.network.module` has no keys of its own"),
        ("unet.dropout=0.1", None),  # allowed: Hydra's own message says how to add it
        ("seed=many", None),  # known: Hydra's own message says what it must be
    ],
)
def test_an_unknown_key_of_the_command_line_is_explained(override, expected):
    with pytest.raises(ConfigCompositionException) as refused:
        composed("experiment=demo", override)
    explanation = explain_override(refused.value)
    assert (explanation is None) if expected is None else (expected in explanation)


def test_a_group_set_to_null_is_explained():
    with pytest.raises(ValueError, match="Config group override") as refused:
        composed("experiment=demo_autoencoder", "perceptual=null")
    assert "`perceptual=none`" in explain_override(refused.value)


def test_a_group_that_is_off_names_its_options():
    with pytest.raises(ConfigCompositionException) as refused:
        composed("experiment=demo_autoencoder", "adversarial.start=3")
    assert "allowed are `adversarial=patch|patch_small`" in explain_override(refused.value)


def test_building_sets_no_seed_but_the_configured_one(tiny_runs):
    cfg = composed("experiment=demo", "trainer.accelerator=cpu", "logger=none", root=tiny_runs)
    torch.manual_seed(1)
    first = build(cfg).stage.state_dict()
    torch.manual_seed(2)
    second = build(cfg).stage.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
