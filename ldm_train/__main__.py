"""`python -m ldm_train experiment=...`: compose the config from `conf/`, then train."""

import os
import sys

import hydra
from omegaconf import DictConfig

from ldm_train.config import ConfigError, conf_dir, explain_override, explain_unmade, register
from ldm_train.train import train

register()


def job(cfg: DictConfig) -> float | None:
    """Run one job."""
    try:
        return train(cfg)
    except ConfigError as error:
        if "SUBMITIT_EXECUTOR" in os.environ:  # what is raised reaches the process that has submitted this one
            raise
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
