"""A subject in a few images, beside images of its class: what DreamBooth trains on (Ruiz et al. 2023).

With x of the subject, captioned "a photo of sks dog", and x_pr of its class, "a photo of a dog", equation 2 is

    L = E[ w_t || f(x_t, c) - x ||^2 ]  +  lambda E[ w_t' || f(x_pr,t', c_pr) - x_pr ||^2 ]

The second term keeps the class what it was (prior preservation); x_pr come from the model itself before it is trained,
or are given. Here both are data sets of a mixture with the weights 1 and lambda. Its expected loss is L / (1 + lambda):
the same minimum, and the same steps of an optimizer that does not feel the scale of the loss, as Adam. With
`data.mixture_block` the shares are exact in every few images and not on average alone: with lambda = 1 and blocks of 2
an even global batch holds as many images of the subject as of its class, which is the published batch.
"""

import math
from typing import Any

from ldm_train.batch import WantedImages
from ldm_train.data.folders import FolderShards, holds
from ldm_train.data.writing import MAX_SAMPLES_PER_SHARD

_NODE = "data.mixture"


def subject_mixture(
    instance_dir: str,
    instance_prompt: str | None,
    shard_dir: str,
    generated_dir: str,
    image_size: int,
    trigger: str | None = None,
    class_prompt: str | None = None,
    class_dir: str | None = None,
    num_class_images: int = 200,
    prior_weight: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """The mixture of a subject and its class.

    Args:
        instance_dir: a folder of images of the subject.
        instance_prompt: the caption of those that have no `.txt`; None: all have one.
        shard_dir: where the shards are kept that are made of the folders.
        generated_dir: where generated images of the class are kept.
        image_size: their side in pixels.
        trigger: the word that the subject is learned under; captions without it get it in front.
        class_prompt: the caption of the class; None, without `class_dir`: no prior preservation.
        class_dir: a folder of images of the class; None: they are generated.
        num_class_images: how many are generated.
        prior_weight: lambda.

    Returns:
        Name -> `shards` and `weight`.

    Raises:
        ValueError: if an argument is out of its range or contradicts another.
    """
    if not 1 <= num_class_images <= MAX_SAMPLES_PER_SHARD:
        _refuse("num_class_images", num_class_images, f"numbers from 1 to {MAX_SAMPLES_PER_SHARD}")
    if not 0.0 < prior_weight < math.inf:
        _refuse(
            "prior_weight",
            prior_weight,
            "finite weights above 0; `data.mixture.class_prompt=null` goes without a prior",
        )
    if trigger is not None and class_prompt is not None and holds(class_prompt, trigger):
        _refuse("class_prompt", repr(class_prompt), f"captions without the trigger {trigger!r}, which is the subject's")
    instance = FolderShards(
        instance_dir, shard_dir, instance_prompt, trigger, f"{_NODE}.instance_dir", f"{_NODE}.instance_prompt"
    )
    mixture: dict[str, dict[str, Any]] = {"instance": {"shards": instance, "weight": 1.0}}
    if class_prompt is None and class_dir is None:
        return mixture
    wanted = WantedImages(str(class_prompt), num_class_images, image_size, generated_dir) if class_dir is None else None
    of_class = FolderShards(
        class_dir or generated_dir,
        shard_dir,
        class_prompt,
        None,
        f"{_NODE}.class_dir",
        f"{_NODE}.class_prompt",
        wanted,
    )
    return mixture | {"class": {"shards": of_class, "weight": float(prior_weight)}}


def _refuse(key: str, found: object, allowed: str) -> None:
    raise ValueError(f"{key} is {found}; allowed are {allowed}; change `{_NODE}.{key}`")
