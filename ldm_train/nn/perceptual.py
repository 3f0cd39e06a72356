r"""LPIPS: the distance of two images in the features of a network that classifies images.

    d(x, y) = sum over five layers l of VGG16 of  mean over positions of  sum_c  w_lc (f_lc(x) - f_lc(y))^2

with the features f_l, divided at each position by their norm over the channels, and weights w_l >= 0 that were fitted
to people's judgements (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
eq. 1). The same class is the perceptual loss of stage 1 and its metric.

The weights w come with torchmetrics. Those of VGG16 are a file on disk, and nothing is ever downloaded:
`tools/fetch_weights.py` does that, on a machine with a network.

Letters: B batch, H and W image height and width.
"""

import pickle
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

VGG16_FILE = "vgg16-397923af.pth"

_TAPS = (4, 9, 16, 23, 30)  # each of VGG16's five stages up to the last activation before its pooling
_SMALLEST_IMAGE = 16  # pixels; the four poolings in between halve the image
_MEAN = (-0.030, -0.088, -0.188)  # of the images VGG16 was trained on, on a scale from -1 to 1
_STD = (0.458, 0.448, 0.450)
_EPSILON = 1e-8


class LPIPS(nn.Module):
    """The perceptual distance of images in [-1, 1]; frozen, and always in evaluation mode.

    Args:
        weight: of this distance in a loss, where whoever adds it up reads it; with 0 no file is needed and no distance
            can be computed.
        backbone: path of VGG16's weights `vgg16-397923af.pth`; `None` takes the file from torch's cache.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds another network, or the weight is negative.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weight: float = 1.0, backbone: str | None = None) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight is {weight}; allowed are numbers from 0; change `perceptual.weight`")
        self.weight = weight
        path = cached_backbone() if backbone is None else Path(backbone)
        self.stages = _backbone(path) if weight else nn.ModuleList()
        for index, head in enumerate(_head_weights()):
            self.register_buffer(f"head_{index}", head)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W) in [-1, 1]
        y: Tensor,  # (B, 3, H, W) in [-1, 1]
    ) -> Tensor:  # (B,)
        """The distance of each pair; gradients reach both images. Norms and sums in float32 even under autocast.

        Raises:
            ValueError: if the images are too small for VGG16.
            RuntimeError: if the weight is 0, for which no network was loaded.
        """
        if not self.stages:
            raise RuntimeError("the weight of LPIPS is 0; allowed here are numbers above 0; change `perceptual.weight`")
        self.require_size(*x.shape[-2:])
        distances = []
        h_x, h_y = (x - self.mean) / self.std, (y - self.mean) / self.std
        for index, stage in enumerate(self.stages):
            h_x, h_y = stage(h_x), stage(h_y)
            difference = (_normalised(h_x) - _normalised(h_y)).square()
            distances.append((difference * self.get_buffer(f"head_{index}")).sum(1).mean((1, 2)))
        return torch.stack(distances).sum(0)

    def require_size(self, height: int, width: int) -> None:
        """Refuse, with ValueError, images of too few pixels for VGG16."""
        if min(height, width) < _SMALLEST_IMAGE:
            raise ValueError(
                f"images are {height} x {width}, too small for VGG16; allowed are {_SMALLEST_IMAGE} x "
                f"{_SMALLEST_IMAGE} and more; change `image_size`, or do without `perceptual`"
            )


def cached_backbone() -> Path:
    """Where torch's cache keeps the weights of VGG16; a file or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE


def _normalised(features: Tensor) -> Tensor:
    """Features (B, C, h, w) over their norm at each position; the epsilon keeps its gradient finite at zero."""
    features = features.float()
    return features / torch.sqrt(_EPSILON + features.square().sum(1, keepdim=True))


def _head_weights() -> list[Tensor]:
    """The weights w_l as (1, C, 1, 1), the finest layer first."""
    with as_file(files("torchmetrics") / "functional" / "image" / "lpips_models" / "vgg.pth") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"] for index in range(len(_TAPS))]


def _backbone(path: Path) -> nn.ModuleList:
    """VGG16's convolutions in five stages, with the weights of a file."""
    with torch.device("meta"):  # no time for random weights, which the file replaces
        layers = torchvision.models.vgg16(weights=None).features[: _TAPS[-1]]
    layers.load_state_dict(_backbone_weights(path, layers.state_dict()), assign=True)
    return nn.ModuleList(layers[start:end] for start, end in pairwise((0, *_TAPS)))


def _backbone_weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions' part of a file with VGG16's weights, under the names of `expected`."""
    allowed = f"allowed is {VGG16_FILE} (553 MB), the weights of torchvision's VGG16"
    remedy = "run `python tools/fetch_weights.py vgg16` where there is a network, or change `perceptual.backbone`"
    if not path.is_file():
        raise FileNotFoundError(f"found no file {path}; {allowed}; {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: state[f"features.{name}"] for name in expected}
        matches = all(weights[name].shape == tensor.shape for name, tensor in expected.items())
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}); {allowed}; {remedy}") from error
    if not matches:
        raise ValueError(f"{path} holds tensors of other shapes; {allowed}; {remedy}")
    return weights
