import shutil
import tempfile
from pathlib import Path

import pytest

from .cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster():
    """A SLURM of two nodes for the whole session."""
    if missing := missing_programs():
        pytest.skip(
            f"SLURM is not installed: {', '.join(missing)} not found; on Debian: apt-get install slurm-wlm munge"
        )
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folders have names too long for sockets
    try:
        with Cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
