r"""An exponential moving average of trainable parameters, the weights one samples with.

    average_n = d_n average_{n-1} + (1 - d_n) theta_n,        d_n = min(d, (1 + n) / (10 + n))

n counts the updates before this one; the warm-up bound lets the average forget its random start. The decay d is given
directly, or as a half-life in images, which does not change with the batch size:

    d = 2^{-(images since the last update) / half-life}.

The warm-up is that of TensorFlow's `ExponentialMovingAverage`; the half-life in images that of Karras et al.,
"Analyzing and Improving the Image Quality of StyleGAN", 2020. The average is kept in float32, whatever the parameters'
type: with d = 0.9999 a bfloat16 average would never move.

The average of a large network on a GPU may be kept on the host, where memory is cheap. An update then copies the
parameters once, to pinned memory and without waiting for each, and averages them there; what a validation swaps out
waits there too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class ExponentialMovingAverage:
    """The average of a module's trainable parameters, held beside the module and not inside it.

    It keeps names and float32 copies and no reference to the module, which is handed in at each call; so it survives
    `module.to(...)` and neither doubles the module's state dict nor travels with its copies.

    Args:
        module: the module whose trainable parameters are averaged; the average starts at their present values.
        decay: d in [0, 1); `None` with `half_life_images`.
        half_life_images: the images after which an old value counts half; `None` with `decay`.
        without: prefixes of names that are left out.
        device: `cpu` keeps the averages on the host; `None` keeps each where its parameter is.

    Attributes:
        average: name -> float32 tensor of the parameter's shape.
        num_updates: n, the updates made so far.

    Raises:
        ValueError: see `check`.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float | None = 0.9999,
        half_life_images: float | None = None,
        without: tuple[str, ...] = (),
        device: str | None = None,
    ) -> None:
        self.check(decay, half_life_images, device)
        self.decay, self.half_life_images, self.device = decay, half_life_images, device
        self.num_updates = 0
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(device, torch.float32, copy=True)
            for name, parameter in _trainable(module).items()
            if not name.startswith(without or ("\0",))
        }
        self._pinned: dict[str, Tensor] = {}  # host memory that a GPU can write to while others are under way
        self.raw: dict[str, Tensor] | None = None  # the parameters' own values while the averages stand in for them

    @staticmethod
    def check(decay: float | None, half_life_images: float | None, device: str | None) -> None:
        """Refuse arguments that describe no average.

        Raises:
            ValueError: neither or both of `decay` and `half_life_images` are given, or one is out of range, or the
                device is another.
        """
        if (decay is None) == (half_life_images is None):
            raise ValueError(
                f"EMA found decay={decay} and half_life_images={half_life_images}; exactly one of the two is allowed: "
                "set `callbacks.ema.decay` or `callbacks.ema.half_life_images`, and the other one to null."
            )
        if not 0 <= (decay or 0) < 1 or (half_life_images is not None and half_life_images <= 0):
            raise ValueError(
                f"EMA found decay={decay}, half_life_images={half_life_images}; allowed are 0 <= decay < 1 and "
                "half_life_images > 0: change `callbacks.ema.decay` or `callbacks.ema.half_life_images`."
            )
        if device not in (None, "cpu"):
            raise ValueError(
                f"EMA found device={device!r}; allowed are cpu (on the host) and null (beside the parameters): change "
                "`callbacks.ema.device`."
            )

    def next_decay(self, images: int = 1) -> float:
        """d_n of the next update, after `images` images since the last one."""
        n = self.num_updates
        decay = self.decay if self.half_life_images is None else 0.5 ** (images / self.half_life_images)
        assert decay is not None
        return min(decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self, module: nn.Module, images: int = 1) -> None:
        """Moves the averages towards the module's parameters, once per optimizer step.

        Args:
            module: the averaged module.
            images: images since the last update, over all ranks; read only when a half-life is set.

        Raises:
            RuntimeError: the averages are swapped into the module at the moment.
        """
        if self.raw is not None:
            raise RuntimeError("the EMA cannot be updated while it is swapped in: the module holds the averages")
        values = [value.float() for value in self._values(module)]
        torch._foreach_lerp_(list(self.average.values()), values, 1.0 - self.next_decay(images))
        self.num_updates += 1

    @contextmanager
    def swap(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module's parameters are the averages; after it they are their own, bit for bit."""
        if self.raw is not None:
            raise RuntimeError("the EMA is already swapped in")
        parameters = self._parameters(module)
        self.raw = {name: parameter.detach().to(self.device, copy=True) for name, parameter in parameters.items()}
        try:
            _copy(parameters, self.average)
            yield
        finally:
            _copy(parameters, self.raw)
            self.raw = None

    def state_dict(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """Plain tensors: `num_updates` (int64 scalar) and `average`, name -> float32 tensor."""
        return {"num_updates": torch.tensor(self.num_updates), "average": dict(self.average)}

    def load_state_dict(self, state: Mapping[str, Tensor | Mapping[str, Tensor]]) -> None:
        """Takes the averages and the count of `state_dict()`; names and shapes must be the same.

        Raises:
            ValueError: a name is missing or unexpected, or a shape differs; all of them are listed.
        """
        average, num_updates = state["average"], state["num_updates"]
        assert isinstance(average, Mapping)
        assert isinstance(num_updates, Tensor)
        _compare(self.average, average)
        for name, value in self.average.items():
            value.copy_(average[name])
        self.num_updates = int(num_updates)

    def _values(self, module: nn.Module) -> list[Tensor]:
        """The values of the averaged parameters, where the averages are; read them before the next call."""
        parameters = self._parameters(module)
        if self.device is None:
            return list(parameters.values())
        devices = {parameter.device for parameter in parameters.values() if parameter.device.type != "cpu"}
        values = [
            self._send(name, parameter) if parameter.device in devices else parameter
            for name, parameter in parameters.items()
        ]
        for device in devices:
            torch.accelerator.synchronize(device)
        return values

    def _send(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Where the parameter's values will be when its device has finished."""
        if name not in self._pinned:
            self._pinned[name] = torch.empty_like(parameter, device="cpu", pin_memory=True)
        return self._pinned[name].copy_(parameter, non_blocking=True)

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The averaged parameters in the order of `average`; a part frozen since then stays averaged."""
        parameters = dict(module.named_parameters())
        return {name: parameters[name] for name in self.average}


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _compare(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises with a list of all differences between the names and shapes of two sets of tensors."""
    lines = [f"  missing:    {name}" for name in own.keys() - found.keys()]
    lines += [f"  unexpected: {name}" for name in found.keys() - own.keys()]
    lines += [
        f"  shape:      {name} is {tuple(found[name].shape)}, must be {tuple(own[name].shape)}"
        for name in own.keys() & found.keys()
        if own[name].shape != found[name].shape
    ]
    if lines:
        raise ValueError(
            "the checkpoint's EMA belongs to another set of trainable parameters:\n"
            + "\n".join(sorted(lines))
            + "\nAllowed are exactly the trainable parameters of the stage: restore the network's configuration "
            "(`unet`, `conditioner`, `stage`), or start a new run with `resume=never`."
        )


def load_average(module: nn.Module, state: Mapping[str, Tensor | Mapping[str, Tensor]]) -> None:
    """Puts the averages of a checkpoint's `ema` entry into a module for good, to sample with them.

    Args:
        module: holds at least every averaged parameter; its other parameters stay.
        state: an `ExponentialMovingAverage.state_dict()`.

    Raises:
        ValueError: the module lacks an averaged parameter, or a shape differs.
    """
    average = state["average"]
    assert isinstance(average, Mapping)
    parameters = {name: parameter for name, parameter in module.named_parameters() if name in average}
    _compare(parameters, average)
    _copy(parameters, average)
