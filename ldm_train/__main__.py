"""`python -m ldm_train experiment=...`: compose the config from `conf/`, then train; with `--dry-run`, check alone."""

import shutil
import sys
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ldm_train.config import ConfigError, conf_dir, dry_run_output, explain_override, explain_unmade, register
from ldm_train.dry_run import dry_run
from ldm_train.isolation import run_in_child
from ldm_train.stacks import answering_with_stacks
from ldm_train.train import train

register()


def job(cfg: DictConfig) -> float | None:
    """Run one job, or check it; in a multirun its mistakes are the sweep's affair (`ldm_train.multirun`)."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        launcher = str(HydraConfig.get().launcher._target_)
        return run_in_child(partial(train, cfg)) if launcher.endswith(".BasicLauncher") else train(cfg)
    if cfg.dry_run:
        try:
            is_ready = dry_run(cfg)
        finally:
            shutil.rmtree(dry_run_output(), ignore_errors=True)
        if not is_ready:
            sys.exit(1)
        return None
    try:
        return train(cfg)
    except ConfigError as error:
        print(f"ldm_train: {error}", file=sys.stderr)
        sys.exit(2)


main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)


def as_overrides(arguments: list[str]) -> list[str]:
    """The command line with the flag of ours as the key that it stands for.

    Raises:
        SystemExit: if it asks for a dry run of a multirun, whose jobs would be started, or submitted, to be checked.
    """
    found = ["dry_run=true" if argument == "--dry-run" else argument for argument in arguments]
    if "dry_run=true" in found and (several := {"-m", "--multirun"}.intersection(found)):
        sys.exit(
            f"ldm_train: a dry run of several jobs ({', '.join(several)}); allowed is one job: leave it and `hydra=` "
            "out, and give each key one of its values"
        )
    return found


if __name__ == "__main__":
    sys.argv = as_overrides(sys.argv)
    # By this name, and not by `__main__`, a submitted job finds the function, and what registers the resolvers.
    from ldm_train.__main__ import main

    try:
        with answering_with_stacks():
            main()
    except SystemExit as stop:
        # Hydra prints that a key is unknown, or a directory not to be written, and exits while it handles that error;
        # what is allowed, it does not say.
        explanation = explain_override(stop.__context__) or explain_unmade(stop.__context__)
        if explanation:
            print(f"ldm_train: {explanation}", file=sys.stderr)
        raise
