"""`python -m ldm_train experiment=...`: compose the config from `conf/`, then train."""

import sys
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ldm_train.config import ConfigError, conf_dir, explain_override, explain_unmade, register
from ldm_train.isolation import run_in_child
from ldm_train.train import train

register()


def job(cfg: DictConfig) -> float | None:
    """Run one job; in a multirun its mistakes are the sweep's affair (`ldm_train.multirun`)."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        launcher = str(HydraConfig.get().launcher._target_)
        return run_in_child(partial(train, cfg)) if launcher.endswith(".BasicLauncher") else train(cfg)
    try:
        return train(cfg)
    except ConfigError as error:
        print(f"ldm_train: {error}", file=sys.stderr)
        sys.exit(2)


main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)


if __name__ == "__main__":
    # By this name, and not by `__main__`, a submitted job finds the function, and what registers the resolvers.
    from ldm_train.__main__ import main

    try:
        main()
    except SystemExit as stop:
        # Hydra prints that a key is unknown, or a directory not to be written, and exits while it handles that error;
        # what is allowed, it does not say.
        explanation = explain_override(stop.__context__) or explain_unmade(stop.__context__)
        if explanation:
            print(f"ldm_train: {explanation}", file=sys.stderr)
        raise
