"""Feature extractors: image bytes -> a vector per image, on which a metric compares sets of images.

Two are known. `InceptionFeatures` is the network that FID was defined with and needs its published weights on disk.
`RandomConvFeatures` needs nothing: its filters are drawn from a fixed seed, so that its figures are the same on every
machine, and its name goes into the key of every figure made with it, so that nobody takes them for the Inception FID.
Random filters tell colour layouts and textures apart, not meanings; enough to see a small model learn.
"""

from abc import ABC, abstractmethod
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from ldm_train.metrics.images import to_uint8
from ldm_train.randomness import Stream, normal

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_PAGE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"


class FeatureExtractor(nn.Module, ABC):
    """The contract: `forward` maps bytes (or floats in [-1, 1]) to features, without gradients, in float32.

    Attributes:
        name: goes into the keys of the figures, see `fid_key`.
        num_features: D.
        fingerprint: equal for two extractors if and only if they give the same features; stored with statistics.
    """

    name: str
    num_features: int
    fingerprint: str

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,  # (B, 3, H, W) uint8, or float in [-1, 1]
    ) -> Tensor:  # (B, D) float32
        """The features of each image; autocast is switched off, since half precision moves a Frechet distance."""
        with torch.autocast(images.device.type, enabled=False):
            return self.features(to_uint8(images)).float()

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D)."""


class RandomConvFeatures(FeatureExtractor):
    """A fixed multi-scale convolutional network with weights drawn from a fixed seed: 208 features, no file.

    The image is resized to 32 x 32 (antialiased). Then, in this order:

    - 48: the mean colours of a 4 x 4 grid, the layout;
    - 96: at 32, 16 and 8 pixels, the means of 32 rectified responses of 5 x 5 filters: how much there is of a texture
      or a colour contrast;
    - 64: 16 responses of a second layer on those at 8 pixels, averaged on a 2 x 2 grid: coarse shapes.

    Filters have unit norm and no mean: they are blind to flat grey. Fixed gains give the three groups about equal
    variance over a set of coloured drawings.
    """

    name = "randomconv"
    num_features = 208
    fingerprint = "randomconv-1"

    _SIZE, _SCALES, _TEXTURES, _SHAPES, _SEED = 32, 3, 32, 16, 0
    _TEXTURE_GAIN, _SHAPE_GAIN = 2.5, 4.0

    textures: Tensor
    shapes: Tensor

    def __init__(self) -> None:
        super().__init__()
        textures = torch.stack([self._filters(scale, self._TEXTURES, 3, 5) for scale in range(self._SCALES)])
        self.register_buffer("textures", textures, persistent=False)
        self.register_buffer("shapes", self._filters(self._SCALES, self._SHAPES, self._TEXTURES, 3), persistent=False)

    def _filters(self, layer: int, out_channels: int, in_channels: int, size: int) -> Tensor:
        """Filters (out, in, size, size) of zero mean and unit norm; drawn on the CPU, so equal for all devices."""
        shape = (out_channels, in_channels, size, size)
        filters = normal(self._SEED, 0, torch.tensor([layer]), Stream.INITIALISATION, shape)[0]
        filters = filters - filters.mean(dim=(1, 2, 3), keepdim=True)
        return filters / filters.flatten(1).norm(dim=1)[:, None, None, None]

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 208)."""
        x = images.float() / 127.5 - 1.0
        x = F.interpolate(x, size=(self._SIZE, self._SIZE), mode="bilinear", antialias=True, align_corners=False)
        parts = [F.adaptive_avg_pool2d(x, 4).flatten(1)]
        for scale, filters in enumerate(self.textures):
            pooled = F.avg_pool2d(x, 2**scale)
            response = F.relu(F.conv2d(F.pad(pooled, (2, 2, 2, 2), mode="replicate"), filters))
            parts.append(self._TEXTURE_GAIN * response.mean(dim=(2, 3)))
        shape = F.relu(F.conv2d(F.pad(response, (1, 1, 1, 1), mode="replicate"), self.shapes))
        parts.append(self._SHAPE_GAIN * F.adaptive_avg_pool2d(shape, 2).flatten(1))
        return torch.cat(parts, dim=1)


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features of the Inception network of 2015 in torch-fidelity's port, with its published weights.

    Images are resized to 299 x 299 as TensorFlow 1 did, without antialiasing, which makes the distance comparable with
    the figures of the literature (ADM, pytorch-fid, torch-fidelity; up to small differences). `antialias=True` is the
    default of torchmetrics >= 1.8 instead; the two must never be compared.

    Args:
        weights_path: the file `weights-inception-2015-12-05-6726825d.pth` on disk; nothing is ever downloaded.
        antialias: how images are resized, see above.

    Raises:
        FileNotFoundError: there is no such file.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights_path: str | Path, antialias: bool = False) -> None:
        super().__init__()
        path = Path(weights_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"found no Inception weights at {path}. Allowed is the file {INCEPTION_FILE} (95.6 MB) from "
                f"{INCEPTION_PAGE}: `python tools/fetch_weights.py inception` gets it on a machine with a network; "
                "put it there, or change `inception_weights` (null: the extractor that needs no weights) of "
                "`callbacks.samples.extractor` or `callbacks.reconstruction_distance.extractor`."
            )
        self.fingerprint = f"inception-{sha256(path.read_bytes()).hexdigest()[:16]}-antialias={antialias}"
        # The network's class reads its weights with an unrestricted unpickler: it gets bytes that we wrote ourselves,
        # after a safe load, and never the file.
        safe = BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], safe, antialias)  # type: ignore[arg-type]

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 2048)."""
        return self.network(images)


def feature_extractor(inception_weights: str | None = None) -> FeatureExtractor:
    """The Inception network when its weights' path is given, the extractor without weights otherwise."""
    return RandomConvFeatures() if inception_weights is None else InceptionFeatures(inception_weights)


def fid_key(extractor: FeatureExtractor) -> str:
    """The key of the Frechet distance in logs: `val/fid` for Inception alone, else `val/fid_<extractor>`."""
    return "val/fid" if extractor.name == "inception" else f"val/fid_{extractor.name}"
