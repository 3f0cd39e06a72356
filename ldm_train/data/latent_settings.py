"""What the values in a cache of latents depend on besides the images; two caches with one of them equal each other."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ldm_train.data.crops import Shape


@dataclass(frozen=True)
class LatentSettings:
    """What the values in a cache depend on besides the images.

    Attributes:
        encoder: sha256 of the encoder's weights, see `ldm_train.checkpoint.encoder_digest`.
        image_size: side in pixels of the squares, or of the square among the shapes.
        factor: f, by which the encoder makes them smaller.
        latent_channels: C.
        moments_per_channel: k.
        dtype: type of the stored numbers, a key of `DTYPES`.
        precision: type in which the encoder ran.
        crop: where squares were cut out of the images.
        flip: whether mirrored images are kept beside the others.
        interpolation: of the resize.
        shapes: those of the aspect buckets, from the tallest to the widest; None: all images are squares.
        segmentation: extension of the segmentation maps that are kept beside the latents; None: none are.
        max_pixels: width x height above which an image was not decoded, so that it has no latents.
    """

    encoder: str
    image_size: int
    factor: int
    latent_channels: int
    moments_per_channel: int
    dtype: str
    precision: str = "float32"
    crop: str = "center"
    flip: bool = False
    interpolation: str = "bicubic"
    shapes: tuple[Shape, ...] | None = None
    segmentation: str | None = None
    max_pixels: int = 1 << 26

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "LatentSettings":
        """Of a JSON object; what is not known is not read.

        Raises:
            KeyError: if it has no shape where one belongs.
            TypeError: if something is missing.
        """
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        if values.get("shapes") is not None:
            values["shapes"] = tuple(Shape(*shape) for shape in values["shapes"])
        return cls(**values)

    @property
    def all_shapes(self) -> tuple[Shape, ...]:
        """The shapes of the images, a square at least."""
        return self.shapes or (Shape(self.image_size, self.image_size),)

    def differences(self, other: "LatentSettings") -> list[str]:
        """`name: ours -> theirs` of every setting that differs."""
        own, others = asdict(self), asdict(other)
        own["shapes"], others["shapes"] = (sizes_of(settings.all_shapes) for settings in (self, other))
        return [f"{name}: {value} -> {others[name]}" for name, value in own.items() if others[name] != value]


def sizes_of(shapes: Sequence[Shape]) -> str:
    """Shapes for people, width by height."""
    return ", ".join(f"{shape.width}x{shape.height}" for shape in shapes)
