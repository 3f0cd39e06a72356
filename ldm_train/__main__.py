"""`python -m ldm_train experiment=...`: compose the config from `conf/`, then train; with `--dry-run`, check alone."""

import shutil
import sys

import hydra
from omegaconf import DictConfig

from ldm_train.config import ConfigError, conf_dir, dry_run_output, explain_override, explain_unmade, register
from ldm_train.dry_run import dry_run
from ldm_train.train import train

register()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run one job, or check it."""
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


def as_overrides(arguments: list[str]) -> list[str]:
    """The command line with the flag of ours as the key that it stands for."""
    return ["dry_run=true" if argument == "--dry-run" else argument for argument in arguments]


if __name__ == "__main__":
    sys.argv = as_overrides(sys.argv)
    try:
        main()
    except SystemExit as stop:
        # Hydra prints that a key is unknown, or a directory not to be written, and exits while it handles that error;
        # what is allowed, it does not say.
        explanation = explain_override(stop.__context__) or explain_unmade(stop.__context__)
        if explanation:
            print(f"ldm_train: {explanation}", file=sys.stderr)
        raise
