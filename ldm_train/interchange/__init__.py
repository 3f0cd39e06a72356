"""Trained autoencoders in the formats of others, both ways: tables of names, shapes and settings, in memory.

Reading files safely and comparing strictly is the business of `ldm_train.checkpoint`; `tools/convert.py` puts the two
together.
"""

from ldm_train.interchange.architecture import Architecture, Imported, build, check_targets
from ldm_train.interchange.compvis import export_compvis, import_compvis
from ldm_train.interchange.diffusers import export_diffusers, import_diffusers

__all__ = [
    "Architecture",
    "Imported",
    "build",
    "check_targets",
    "export_compvis",
    "export_diffusers",
    "import_compvis",
    "import_diffusers",
]
