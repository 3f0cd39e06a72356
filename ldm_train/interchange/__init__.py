"""Trained networks in the formats of others, both ways: tables of names, shapes and settings, in memory.

Reading files safely and comparing strictly is the business of `ldm_train.checkpoint`; `tools/convert.py`, for
autoencoders, and `tools/convert_model.py`, for whole models, put the two together. Files of adapters, which are small
and have many layouts, are read and written here.
"""

from ldm_train.interchange.adapter_files import AdapterFile, read_adapters, write_adapters
from ldm_train.interchange.adapter_metadata import AdapterMetadata
from ldm_train.interchange.adapter_names import AdapterBase, TextShape
from ldm_train.interchange.architecture import Architecture, Imported, build, check_targets
from ldm_train.interchange.compvis import export_compvis, import_compvis
from ldm_train.interchange.diffusers import export_diffusers, import_diffusers
from ldm_train.interchange.diffusers_model import export_diffusers_model, import_diffusers_model
from ldm_train.interchange.model import DiffusionModel
from ldm_train.interchange.schedules import build_schedule
from ldm_train.interchange.stable_diffusion import export_stable_diffusion, import_stable_diffusion
from ldm_train.interchange.unet import UNetArchitecture, build_unet, check_unet_target
from ldm_train.interchange.unet_diffusers import export_diffusers_unet, import_diffusers_unet

__all__ = [
    "AdapterBase",
    "AdapterFile",
    "AdapterMetadata",
    "Architecture",
    "DiffusionModel",
    "Imported",
    "TextShape",
    "UNetArchitecture",
    "build",
    "build_schedule",
    "build_unet",
    "check_targets",
    "check_unet_target",
    "export_compvis",
    "export_diffusers",
    "export_diffusers_model",
    "export_diffusers_unet",
    "export_stable_diffusion",
    "import_compvis",
    "import_diffusers",
    "import_diffusers_model",
    "import_diffusers_unet",
    "import_stable_diffusion",
    "read_adapters",
    "write_adapters",
]
