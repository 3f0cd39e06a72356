"""What a config must not give away: passwords and signatures of URLs, and what opens a store.

A run records its config in checkpoints and logs. Recorded are locations without what is secret in them, and `...` in
place of every value below `storage_options`; a run that resumes takes both from its own config. What a person wrote in
clear is named, for Hydra keeps the command line.
"""

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm_train.data.locations import holds_secret, shown

_OPTIONS = "storage_options"
_SECRET_OPTION = re.compile("key|secret|token|passw|auth|credential|account|connection", re.IGNORECASE)
_DIGITS_OF_LIMITS = 5  # of `connection_timeout` and the like
_INTERPOLATION = re.compile(r"\$\{[^{}]*\}")


def without_secrets(value: Any, is_option: bool = False) -> Any:  # noqa: ANN401
    """URLs without user, password and query; of `storage_options` no text or number that is no URL."""
    if isinstance(value, dict):
        return {key: without_secrets(part, is_option or key == _OPTIONS) for key, part in value.items()}
    if isinstance(value, list):
        return [without_secrets(part, is_option) for part in value]
    if value is None or isinstance(value, bool) or not (is_option or isinstance(value, str)):
        return value
    return "..." if is_option and "://" not in str(value) else shown(str(value))


def secrets_in_clear(cfg: DictConfig) -> list[str]:
    """The keys of `data` whose value holds a secret itself, and not the name of an environment variable that does."""
    data = OmegaConf.to_container(cfg.data, resolve=False) if isinstance(cfg.data, DictConfig) else {}
    return sorted({key for key, text in _texts(data, "data") if _is_secret(key, _INTERPOLATION.sub("", text))})


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _texts(part, path if isinstance(value, list) else f"{path}.{key}")
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, str(value)


def _is_secret(key: str, text: str) -> bool:
    is_option = f".{_OPTIONS}." in key and _SECRET_OPTION.search(key.rpartition(".")[2]) is not None
    is_limit = text.isdigit() and len(text) <= _DIGITS_OF_LIMITS
    return holds_secret(text) or bool(is_option and text.strip() and not is_limit)
