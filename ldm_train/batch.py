"""The types that cross from `data/` to `stages/`: the only thing those two packages agree on.

A batch is a plain dictionary of tensors and lists, so that a worker process can send it and Lightning can move it.
"""

from typing import NamedTuple, NotRequired, TypedDict

from torch import Tensor


class ImageTextBatch(TypedDict):
    """B captioned images of one epoch.

    Attributes:
        image: (B, 3, H, W), there unless the data are cached latents: uint8 as workers send it, a quarter of the
            bytes, and float32 in [-1, 1] once it is on the device.
        moments: (B, k C, h, w) the posterior's moments of the images as the encoder gives them, k for each of C latent
            channels; there if the data are cached latents.
        caption: B strings; an empty string is a valid caption.
        sample_id: (B,) int64, the sample's number in the data set's index, and above its lowest 40 bits the number of
            the visit where a mixture shows a sample more than once in an epoch. Together with the run's seed and the
            epoch it keys every random draw made for the sample, see `ldm_train.randomness.visit_id`.
        position: (B,) int64, the sample's place in the order of its epoch, over all processes: the samples of one step
            have consecutive places, whichever process trains them.
        epoch: the epoch the batch belongs to, a plain int; 0 in validation, so that validation noise never changes.
        key: B strings, `<shard>/<__key__>`, to name a sample to a person.
        original_size: (B, 2) int64 height and width of the image as it was found, upright, before anything was cut off
            or resized; there in training and validation.
        crop: (B, 2) int64 pixels cut off above and to the left of what is shown, counted in the resized image, and
            after a mirroring on the side that is left then (Podell et al. 2023, section 2.2); there likewise.
        label: (B,) int64 class of each image; there if `data.label` asks for it.
        segmentation: (B, H, W) int64 class of each pixel; there if `data.segmentation` asks for it.
        hole: (B, 1, H, W) float32, 1 where a person wants something new in an image and 0 where it must stay; there if
            one asks for it, in training holes are drawn.
    """

    image: NotRequired[Tensor]
    moments: NotRequired[Tensor]
    caption: list[str]
    sample_id: Tensor
    position: Tensor
    epoch: int
    key: list[str]
    original_size: NotRequired[Tensor]
    crop: NotRequired[Tensor]
    label: NotRequired[Tensor]
    segmentation: NotRequired[Tensor]
    hole: NotRequired[Tensor]


class LatentFacts(NamedTuple):
    """What a stage has to know of cached latents before it can take them for its autoencoder's.

    Attributes:
        folder: where they lie, to name them to a person.
        encoder: sha256 of the encoder that made them.
        factor: f, by which it makes images smaller.
        latent_channels: C.
        moments_per_channel: k.
    """

    folder: str
    encoder: str
    factor: int
    latent_channels: int
    moments_per_channel: int


class WantedImages(NamedTuple):
    """Images that a model has to make before they can be data.

    Attributes:
        prompt: what they show.
        number: how many.
        size: their side in pixels.
        folder: where they are kept.
    """

    prompt: str
    number: int
    size: int
    folder: str


class Conditioning(NamedTuple):
    """What a network is conditioned on besides the noisy latents and the time; `None` where an entry is unused.

    Attributes:
        context: (B, N, D) tokens, which enter by cross-attention.
        vector: (B, E) pooled vector, added to the time embedding.
        concat: (B, C, h, w) maps, concatenated to the latents.
    """

    context: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
