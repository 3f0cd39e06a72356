"""Give a frozen text encoder its weights: a file of others, read safely, renamed by a table, compared strictly.

A file may hold the text encoder alone or a whole model around it, in the names of open_clip or of transformers, see
`ldm_train.interchange.clip`. Nothing is ever downloaded: `tools/fetch_weights.py` does that, on a machine with a
network.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm_train.checkpoint import UNTRAINED, read_checkpoint, strict_load
from ldm_train.conditioning import CLIPTextEncoder
from ldm_train.interchange.clip import names, text_tower
from ldm_train.interchange.compvis import SAFE_GLOBALS

# The first that is there is read; folders of transformers, inside a diffusers pipeline or not.
_FILES = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
_PIPELINE = "text_encoder"
_NESTED = 2  # dictionaries under `state_dict`, one in the other


def load_text_encoder(
    encoder: CLIPTextEncoder, weights: str, key: str = "conditioner.encoder.weights"
) -> CLIPTextEncoder:
    """Load a CLIP text encoder's weights.

    Args:
        encoder: as the config describes it.
        weights: path of a `.safetensors`, `.bin`, `.pt` or `.ckpt` file of open_clip, transformers, OpenAI (its state
            dict; the TorchScript archive is a program and is not run) or a whole Stable Diffusion model; of a folder
            of transformers or diffusers; or the word `untrained`, for random weights.
        key: the config key that named it, for errors.

    Returns:
        The encoder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, holds no text encoder, or another one.
    """
    if weights == UNTRAINED:
        return encoder
    try:
        tower = text_tower(_read(_file(Path(weights), encoder, key), key))
        # What lies behind the layer that is used is not there to be loaded; some files leave it out themselves.
        unused = set(names(encoder.num_layers)) - encoder.tower.state_dict().keys()
        kept = {name: value for name, value in tower.tensors.items() if name not in unused}
        strict_load(encoder.tower, kept)
    except ValueError as error:
        raise ValueError(
            f"{weights} does not give the text encoder its weights: {error}; change `{key}`, or the architecture in "
            "`conditioner.encoder.encoder`"
        ) from error
    return encoder


def _file(path: Path, encoder: CLIPTextEncoder, key: str) -> Path:
    """The file of tensors that a path means."""
    folder = path / _PIPELINE if (path / _PIPELINE).is_dir() else path
    file = next((folder / name for name in _FILES if (folder / name).is_file()), path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights of a text encoder at {path}; allowed are a file of open_clip, transformers or a whole Stable "
            f"Diffusion model, a folder with {' or '.join(_FILES)}, and the word {UNTRAINED}; run `python "
            f"tools/fetch_weights.py clip_l14` where there is a network, or change `{key}`"
        )
    if file != path and (config := folder / "config.json").is_file():
        _check_config(json.loads(config.read_text()), encoder, config)
    return file


def _check_config(config: Mapping[str, Any], encoder: CLIPTextEncoder, path: Path) -> None:
    """Compare what no tensor tells; the config is that of the encoder, or of a CLIP model around it."""
    config = config.get("text_config", config)
    for theirs, ours in (("hidden_act", "activation"), ("num_attention_heads", "num_heads")):
        own = getattr(encoder, ours)
        if theirs in config and config[theirs] != own:
            raise ValueError(
                f"{path} says `{theirs}` {config[theirs]!r}, the encoder has {own!r}; allowed are equal ones; change "
                f"`conditioner.encoder.encoder.{ours}`"
            )


def _read(path: Path, key: str) -> dict[str, Tensor]:
    """All tensors of a file, without running code from it."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"it is no safetensors file ({error})") from error
    with torch.serialization.safe_globals([*SAFE_GLOBALS]):
        state = read_checkpoint(path, key, is_foreign=True)
    for _ in range(_NESTED):
        if isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
