"""Hydra's Optuna sweeper, for which a start without one completed trial is no error of its own.

The one it extends asks the study for its best trial at the end, and a study that has none raises, before Hydra calls
what shows the sweep's table. Named by `hydra.sweeper._target_` beside `hydra/sweeper=optuna`; see
`conf/sweep/optuna.yaml`. Without the extra `sweep` there is nothing here.
"""

import importlib.util
import logging

if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is not None:
    from hydra_plugins.hydra_optuna_sweeper import optuna_sweeper

    _NO_TRIALS = "No trials are completed yet."

    class OptunaSweeper(optuna_sweeper.OptunaSweeper):
        """Ends quietly when every trial has failed."""

        def sweep(self, arguments: list[str]) -> None:
            """Run the trials of this start.

            Args:
                arguments: the overrides of the command.
            """
            try:
                super().sweep(arguments)
            except ValueError as error:
                if str(error) != _NO_TRIALS:
                    raise
                logging.getLogger(__name__).error("The study has no completed trial, and so no best one")
