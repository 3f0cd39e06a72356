"""The states that a frozen text encoder gave captions, kept so that it runs once a caption instead of once a step.

Each caption is encoded alone: rounding depends on how many captions an encoder is given at once, and after a resume a
caption is met in other company than before. So its states are a function of the caption and the weights alone, bit for
bit, on one device. They are computed in the weights' own precision, without autocast, and in evaluation mode: torch has
other kernels for training, with other roundings.

Weights that change make the states wrong. So the memory belongs to encoders that do not learn, and forgets all when any
weight was written to since, as it is when a checkpoint is loaded.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_train.batch import Conditioning

if TYPE_CHECKING:
    from ldm_train.conditioning.text import TextConditioner


class StateMemory:
    """Caption -> its states, on the encoder's device.

    Args:
        max_captions: captions to remember at most, the empty one not counted.

    Raises:
        ValueError: if that is not positive.
    """

    def __init__(self, max_captions: int) -> None:
        if max_captions < 1:
            raise ValueError(
                f"remember is {max_captions}; allowed are numbers from 1, or null to encode captions in each step; "
                "change `conditioner.remember`"
            )
        self.max_captions = max_captions
        self._states: dict[str, Conditioning] = {}
        self._weights: list[tuple[int, int, torch.device]] = []

    def __call__(self, conditioner: "TextConditioner", captions: list[str], drop: Tensor | None) -> Conditioning:
        """The states of B captions; `drop` (B,) bool marks those replaced by the empty one.

        Raises:
            ValueError: if there are more different captions than may be remembered.
        """
        weights = [(id(weight), weight._version, weight.device) for weight in conditioner.parameters()]
        if weights != self._weights:
            self._states, self._weights = {}, weights
        states = [self._of(conditioner, caption) for caption in captions]
        if len(self._states) > self.max_captions + ("" in self._states):
            raise ValueError(
                f"more than {self.max_captions} different captions to remember; allowed are small data sets whose "
                "captions do not change from epoch to epoch; raise `conditioner.remember`, or set it to null"
            )
        null = None if drop is None else self._of(conditioner, "")
        return Conditioning(*(self._joined(states, null, drop, k) for k in range(len(Conditioning._fields))))

    @staticmethod
    def _joined(states: list[Conditioning], null: Conditioning | None, drop: Tensor | None, k: int) -> Tensor | None:
        """Entry k of the states of B captions; (B, ...)."""
        if states[0][k] is None:
            return None
        given = torch.cat([state[k] for state in states])  # type: ignore[misc]
        if null is None or drop is None:
            return given
        # On the device: to look which captions are dropped would make the host wait for it in every step.
        return torch.where(drop.to(given.device).view(-1, *[1] * (given.ndim - 1)), null[k], given)  # type: ignore[arg-type]

    @torch.no_grad()
    def _of(self, conditioner: "TextConditioner", caption: str) -> Conditioning:
        if caption not in self._states:
            device, was_training = conditioner.device, conditioner.training
            conditioner.eval()
            with torch.autocast(device.type, enabled=False):
                self._states[caption] = conditioner.encode(conditioner.tokens_of([caption], device))
            conditioner.train(was_training)
        return self._states[caption]
