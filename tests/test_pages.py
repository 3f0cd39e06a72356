"""What the pages say is so: their commands compose, their paths exist, their lists are those of the code."""

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlparse

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from ldm_train.__main__ import as_overrides
from ldm_train.config import check, conf_dir, register

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "slurm" / "README.md"]
OVERRIDE = re.compile(r"^[+~]*[\w./@]+=")
WRITTEN_BY_RUNS = ("demo", "runs/", "quarantine/")
WRITTEN_BY_USERS = {"slurm/site.sh"}
SAID_BY_OTHERS = {  # SLURM, PyTorch, Lightning, submitit
    "Timed out waiting", "Watchdog caught collective operation timeout", "in SLURM ... does not match", "NCCL WARN",
    "Bypassing sacct error",
}  # fmt: skip


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The commands in the pages' bash blocks, each as its words; a continued line is one command."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True) for line in lines if line.strip()]
    return found


def lab_notes() -> list[list[str]]:
    """The commands in the heads of the experiments: `# Run:` and the lines that continue it."""
    found = []
    for path in sorted((conf_dir() / "experiment").glob("*.yaml")):
        head = path.read_text(encoding="utf-8").replace("\\\n#", " ")
        found += [
            shlex.split(re.sub(r" {2,}\(after .*", "", line)) for line in re.findall(r"^# Run: +(.*)$", head, re.M)
        ]
    return found


def starting_with(*words: str) -> list[list[str]]:
    """The commands that start with the words, without them; each once."""
    program = [[Path(command[0]).name, *command[1:]] for command in commands()]
    rest = {tuple(command[len(words) :]) for command in program if tuple(command[: len(words)]) == words}
    return [list(arguments) for arguments in sorted(rest)]


def jobs(script: str) -> list[list[str]]:
    """What the pages give to a batch script."""
    return [rest[rest.index(script) + 1 :] for rest in starting_with("sbatch") if script in rest]


def trainings() -> list[list[str]]:
    """The arguments of every training, whatever starts it: python, srun, torchrun or a batch script."""
    found = {tuple(words[words.index("ldm_train") + 1 :]) for words in commands() if "ldm_train" in words}
    return [list(arguments) for arguments in sorted(found)] + [
        ["trainer=slurm", *a] for a in jobs("slurm/train.sbatch")
    ]


def tools() -> list[list[str]]:
    """The tools with their options, by python or in an array."""
    return [a for a in starting_with("python") if a[0] != "-m"] + jobs("slurm/array.sbatch")


def composed(overrides: list[str]) -> DictConfig:
    """The config of a command's first job: lists of values, in the command or in its sweep file, give their first."""
    single = [first(override) for override in overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", single, return_hydra_config=True)
        if "-m" in overrides or "--multirun" in overrides:
            swept = [first(f"{key}={values}") for key, values in (cfg.hydra.sweeper.params or {}).items()]
            return compose("config", [*single, *swept])
        return compose("config", single)


def first(override: str) -> str:
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(iter(parsed.sweep_string_iterator()))}"


def test_every_kind_of_command_is_found():
    """A page whose blocks are written in another way would pass all other tests."""
    assert {Path(program).name for program, *_ in commands()} == {
        "cp", "export", "make", "mkdir", "python", "python3", "sbatch", "scontrol", "source", "squeue", "srun", "tail",
        "tar", "torchrun", "wandb",
    }  # fmt: skip
    assert len(starting_with("python", "-m", "ldm_train")) >= 10
    assert ["demo"] in starting_with("make")
    assert ["test"] in starting_with("make")
    assert {Path(tool).name for tool, *_ in starting_with("python") if tool != "-m"} == {
        "benchmark.py",
        "cache_latents.py",
        "calibrate_latents.py",
        "collect_sweep.py",
        "convert.py",
        "convert_model.py",
        "fetch_weights.py",
        "index_shards.py",
        "inspect_shards.py",
        "lora.py",
        "make_shards.py",
        "plot_schedule.py",
        "sample.py",
        "sync_wandb.py",
    }


@pytest.mark.parametrize("command", lab_notes(), ids=" ".join)
def test_the_command_of_every_experiment_composes(command):
    register()
    assert command[:3] == ["python", "-m", "ldm_train"]
    check(composed(command[3:]))


def test_every_experiment_has_its_command():
    assert len(lab_notes()) == len(list((conf_dir() / "experiment").glob("*.yaml")))


@pytest.mark.parametrize("arguments", trainings(), ids=" ".join)
def test_training_commands_compose_and_pass_the_checks(arguments):
    register()
    overrides = [argument for argument in as_overrides(arguments) if OVERRIDE.match(argument)]
    assert set(as_overrides(arguments)) - set(overrides) <= {"-m"}
    check(composed(overrides))


def test_the_table_of_autoencoders_is_that_of_the_configs():
    """Options, factors, channels, codes and, on the meta device, parameters."""
    register()
    rows = re.findall(
        r"^\| `((?:kl|vq)_f\w+)`[^|]*\| (\d+) \| (\d+) \| ([\d,]*) ?\| ([\d,]+) \|", text("README.md"), re.M
    )
    options = {path.stem for path in (conf_dir() / "autoencoder").glob("*.yaml")} - {"tiny", "vq_tiny", "pixels"}
    assert {name for name, *_ in rows} == options
    for name, factor, channels, codes, parameters in rows:
        with torch.device("meta"):
            network = hydra.utils.instantiate(composed([f"autoencoder={name}"]).autoencoder, _convert_="all")
        found = (network.downsampling_factor, network.latent_channels, network.regularizer.codebook_size or 0)
        assert found == tuple(int(number.replace(",", "") or 0) for number in (factor, channels, codes))
        assert sum(parameter.numel() for parameter in network.parameters()) == int(parameters.replace(",", ""))


def test_the_table_of_experiments_is_that_of_the_configs():
    """Options, U-Nets and, on the meta device, parameters."""
    register()
    rows = re.findall(r"^\| `(ldm_\w+)` \|[^|]*\|[^|]*\| `(\w+)` \| ([\d,]+) \|", text("README.md"), re.M)
    assert {name for name, *_ in rows} == {path.stem for path in (conf_dir() / "experiment").glob("ldm_*.yaml")}
    for name, unet, parameters in rows:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", [f"experiment={name}"], return_hydra_config=True)
        assert cfg.hydra.runtime.choices.unet == unet
        with torch.device("meta"):
            network = hydra.utils.instantiate(cfg.unet, _convert_="all")
        assert sum(parameter.numel() for parameter in network.parameters()) == int(parameters.replace(",", ""))


@pytest.mark.parametrize("arguments", starting_with("make"), ids=" ".join)
def test_make_has_the_targets(arguments):
    makefile = text("Makefile")
    for target in (argument for argument in arguments if "=" not in argument):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)
    for variable in (argument.split("=")[0] for argument in arguments if "=" in argument):
        assert f"$({variable})" in makefile


@pytest.mark.parametrize("arguments", tools(), ids=" ".join)
def test_tools_take_the_options(arguments, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    tool, *options = arguments
    assert (ROOT / tool).is_file()
    importlib.import_module(Path(tool).stem).parse(options)


@pytest.mark.parametrize("arguments", starting_with("python", "-m", "pytest"), ids=" ".join)
def test_the_tests_of_examples_exist(arguments):
    for name in (argument for argument in arguments if ".py" in argument):
        path, _, test = name.partition("::")
        assert f"def {test}(" in text(path)


@pytest.mark.parametrize("arguments", starting_with("wandb"), ids=" ".join)
def test_wandb_has_the_commands_and_options(arguments):
    words = [argument for argument in arguments if "/" not in argument]
    subcommands = [word for word in words if not word.startswith("-")]
    shown = subprocess.run(
        [Path(sys.executable).parent / "wandb", *subcommands, "--help"], capture_output=True, text=True, check=True
    )
    assert f"wandb {' '.join(subcommands)} " in shown.stdout
    assert [option for option in words if option.startswith("-") and f" {option} " not in shown.stdout] == []


def test_the_environment_is_where_make_puts_it():
    assert starting_with("source") == [[".venv/bin/activate"]]
    assert "VENV := .venv\n" in text("Makefile")


@pytest.mark.parametrize("arguments", starting_with("sbatch") + starting_with("srun"), ids=" ".join)
def test_slurm_has_the_options(arguments):
    end = next(number for number, argument in enumerate(arguments) if not argument.startswith("--"))
    assert arguments[end] in ("python", "pkill") or (ROOT / arguments[end]).is_file()
    allowed = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--kill-on-bad-exit", "--array"}
    assert {argument.partition("=")[0] for argument in arguments[:end]} <= allowed | {"--jobid", "--overlap"}


def test_a_job_that_does_not_move_is_asked_and_nothing_else():
    """Of the job's processes, srun would end by the signal, and W&B's own, and whatever is not a training."""
    pattern = next(words[-1] for words in starting_with("srun") if "pkill" in words)
    training = ["python -m ldm_train trainer=slurm", "/a/b/.venv/bin/python3 -u -m ldm_train experiment=demo",
                "/usr/bin/python3.12 -u -m submitit.core._submit /a/b/.submitit/1"]  # fmt: skip
    other = ['srun --kill-on-bad-exit=1 bash -c trap "" QUIT; "$@" task python -m ldm_train', "/a/wandb-core --pid 7",
             'bash -c trap "" QUIT; "$@" task python -m ldm_train trainer=slurm', "python tools/sample.py"]  # fmt: skip
    assert [line for line in training + other if re.search(pattern, line)] == training


def test_the_messages_of_the_page_for_clusters_are_said_somewhere():
    rows = text("slurm/README.md").split("| it says | what it is | what helps |")[1].split("\n\n")[0].splitlines()[2:]
    said = {message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    assert said > SAID_BY_OTHERS
    sources = [*(ROOT / "ldm_train").rglob("*.py"), *(ROOT / "slurm").glob("*.sh")]
    source = re.sub(r'"\s+f?"', "", "".join(path.read_text(encoding="utf-8") for path in sources))
    pieces = [piece for message in said - SAID_BY_OTHERS for piece in re.sub("^rank 3 ", "", message).split(" ... ")]
    assert [piece for piece in pieces if piece.replace("'auto'", "{devices!r}") not in source] == []


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_paths_and_links_exist(page):
    """Names in backticks that look like files of the repository or the package, and every link that stays in it."""
    code = re.sub(r"^ *```.*?^ *```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", code) if not urlparse(link).scheme]
    here = (ROOT / page).parent
    missing = [link for link in links if not (here / link.partition("#")[0]).exists()]
    named = {name for name in re.findall(r"`([\w./-]+)`", code) if not name.startswith(WRITTEN_BY_RUNS)}
    named -= WRITTEN_BY_USERS
    paths = {name for name in named if re.search(r"/$|/.*\.(py|yaml|sh|sbatch|md)$|^\.ci/|^\w+\.(py|md)$", name)}
    missing += [name for name in paths if not ((ROOT / name).exists() or (ROOT / "ldm_train" / name).exists())]
    assert missing == []


@pytest.mark.slow
def test_a_run_leaves_behind_what_the_readme_lists(tiny_runs):
    listed = re.findall(r"^\| `(demo\w*/default/[^`]+)` \|", text("README.md"), re.MULTILINE)
    # The fixture calls `train` itself: Hydra's record is not written, and W&B is off.
    expected = [pattern for pattern in listed if "/.hydra/" not in pattern and "/wandb/" not in pattern]
    assert len(expected) >= 5
    assert [pattern for pattern in expected if not list(tiny_runs.glob(pattern))] == []


def test_the_import_order_is_the_one_that_is_enforced():
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    enforced = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    enforced = [re.sub(r"\bldm_train\.", "", layer) for layer in enforced]
    block = re.search(r"```\n(__main__ .*?)```", text("ARCHITECTURE.md"), re.DOTALL)
    assert [re.match(r"\w+( \| \w+)*", line)[0] for line in block[1].splitlines()] == enforced


def test_every_config_group_is_listed_in_the_order_of_the_contents_page():
    table = text("ARCHITECTURE.md").split("| group | chooses |")[1].split("\n\n")[0]
    listed = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    contents = re.findall(r"^  - (?:optional )?(\w+): ", text("conf/config.yaml"), re.MULTILINE)
    assert listed == contents
    assert sorted(listed) == sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def test_every_folder_of_the_package_is_listed():
    table = text("ARCHITECTURE.md").split("| in `ldm_train/` | holds |")[1].split("\n\n")[0]
    folders = {path.name for path in (ROOT / "ldm_train").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE)) == folders


def test_the_sizes_in_the_table_from_tar_to_loss_are_those_of_the_demo():
    register()
    cfg = composed(["experiment=demo"])
    table = text("README.md").split("## From tar to loss")[1].split("\n## ")[0]
    side = cfg.image_size // 2 ** (len(cfg.autoencoder.channel_multipliers) - 1)
    latents = f"`(B, {cfg.autoencoder.latent_channels}, {side}, {side})`"
    assert f"image `(3, {cfg.image_size}, {cfg.image_size})`" in table
    assert f"`(B, {cfg.conditioner.context_length}, {cfg.conditioner.context_dim})`" in table
    assert table.count(latents) == 2
    assert f"predict {cfg.stage.denoiser.prediction} |" in table
    assert cfg.callbacks.ema is not None


def test_no_figure_is_left_open():
    assert [page for page in PAGES if "{FIGURE" in page.read_text(encoding="utf-8")] == []
