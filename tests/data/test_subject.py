"""A subject beside its class: exact shares in every batch, and the loss of Ruiz et al. 2023, equation 2."""

import numpy as np
import pytest

from ldm_train.data import FolderShards, ImageTextDataModule, MixedOrder, ShuffledOrder, subject_mixture

from .conftest import picture


@pytest.fixture
def folders(tmp_path):
    for name, count in (("subject", 8), ("class", 20)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i:02d}.png").write_bytes(picture(i + 100 * count))
    return {"instance_dir": str(tmp_path / "subject"), "instance_prompt": "a zwx dog", "image_size": 8} | {
        key: str(tmp_path / key) for key in ("shard_dir", "generated_dir")
    }


def module_of(mixture, batch_size=4, block=2):
    module = ImageTextDataModule(
        None, 8, batch_size, 0, mixture=mixture, mixture_block=block, mixture_length=40, shuffle_groups=1
    )
    module.setup("fit")
    return module


@pytest.mark.parametrize(("weight", "block", "of_class"), [(1.0, 2, 6), (0.5, 3, 4), (2.0, 3, 8), (0.2, 6, 2)])
def test_every_batch_has_the_exact_shares(folders, tmp_path, weight, block, of_class):
    mixture = subject_mixture(**folders, class_prompt="a dog", class_dir=str(tmp_path / "class"), prior_weight=weight)
    batches = list(module_of(mixture, 12, block).train_dataloader())
    assert len(batches) == 3
    assert [batch["caption"].count("a dog") for batch in batches] == [of_class] * 3
    assert all(batch["caption"].count("a zwx dog") == 12 - of_class for batch in batches)


def test_each_image_comes_once_before_any_comes_twice(folders, tmp_path):
    mixture = subject_mixture(**folders, class_prompt="a dog", class_dir=str(tmp_path / "class"))
    keys = [key for batch in module_of(mixture).train_dataloader() for key in batch["key"]]
    captions = [caption for batch in module_of(mixture).train_dataloader() for caption in batch["caption"]]
    of_subject = [key for key, caption in zip(keys, captions, strict=True) if caption == "a zwx dog"]
    assert len(of_subject) == 20
    assert len({*of_subject[:8]}) == len({*of_subject[8:16]}) == 8


def test_visits_of_one_image_within_an_epoch_have_draws_of_their_own(folders):
    batches = list(module_of(subject_mixture(**folders), block=2).train_dataloader())
    ids = [i for batch in batches for i in batch["sample_id"].tolist()]
    assert len(ids) == len({*ids}) == 40  # of eight images


def test_the_mixture_s_loss_is_equation_2_over_one_plus_lambda(folders, tmp_path):
    """With any loss of a sample, here a number for each image, over as many epochs as make both sets whole."""
    weight = 0.5
    mixture = subject_mixture(**folders, class_prompt="a dog", class_dir=str(tmp_path / "class"), prior_weight=weight)
    module = module_of(mixture, block=3)
    losses = np.concatenate([np.arange(8.0), 50.0 + np.arange(20.0)])  # by row: the subject's come first
    order = module.corpus.order
    rows = np.concatenate(
        [order.rows(epoch, np.arange(40)) for epoch in range(3)]
    )  # 80 of the subject, 40 of the class
    assert losses[rows].mean() == pytest.approx((losses[:8].mean() + weight * losses[8:].mean()) / (1 + weight))


def test_the_reference_images_can_be_those_of_the_subject(folders, tmp_path):
    module = module_of(subject_mixture(**folders, class_prompt="a dog", class_dir=str(tmp_path / "class")))
    (batch,) = module.reference_batches(20, 20, "instance")
    assert batch["caption"] == ["a zwx dog"] * 8
    assert len(next(iter(module.reference_batches(3, 3, "class")))["caption"]) == 3
    with pytest.raises(ValueError, match=r"no data set 'klass'; allowed are instance, class"):
        next(iter(module.reference_batches(1, 1, "klass")))


def test_without_a_class_there_is_no_prior(folders):
    assert list(subject_mixture(**folders)) == ["instance"]


def test_missing_class_images_are_wanted_of_the_model(folders, tmp_path):
    of_class = subject_mixture(**folders, class_prompt="a dog", num_class_images=5)["class"]["shards"]
    assert isinstance(of_class, FolderShards)
    assert of_class.wanted == ("a dog", 5, 8, folders["generated_dir"])
    given = subject_mixture(**folders, class_prompt="a dog", class_dir=str(tmp_path / "class"))["class"]["shards"]
    assert given.wanted is None


@pytest.mark.parametrize(
    ("key", "value"), [("num_class_images", 0), ("prior_weight", 0.0), ("class_prompt", "a photo of ZWX dog")]
)
def test_values_out_of_range_name_the_key(folders, key, value):
    with pytest.raises(ValueError, match=rf"{key} is .* change `data.mixture.{key}`"):
        subject_mixture(**folders, trigger="zwx", **{key: value})


def test_small_blocks_without_exact_shares_are_refused():
    orders = [ShuffledOrder(np.array([0, 8]), 0, 1, 8), ShuffledOrder(np.array([0, 20]), 0, 1, 8)]
    with pytest.raises(ValueError, match=r"2 images would have \[1, 1\].* change `data.mixture_block`"):
        MixedOrder(orders, [0, 8], [1.0, 0.5], 0, block=2)
    assert MixedOrder(orders, [0, 8], [1.0, 0.3], 0, block=13).describe()["mixture"] == [10, 3]
