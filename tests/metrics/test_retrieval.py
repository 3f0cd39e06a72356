import pytest
import torch

from ldm_train.metrics import CaptionRetrieval, RandomConvFeatures, retrieval_at_1


def _bytes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8).repeat_interleave(8, 2)


def test_every_image_finds_itself_and_a_derangement_finds_nothing():
    references = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    assert retrieval_at_1(references, references) == 1.0
    assert retrieval_at_1(references.roll(1, dims=0), references) == 0.0
    half = torch.cat([references[:8], references[8:].roll(1, dims=0)])
    assert retrieval_at_1(half, references) == 0.5


def test_one_image_for_all_captions_is_chance_even_when_references_repeat():
    references = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    assert retrieval_at_1(references[3].expand(10, 5), references).item() == pytest.approx(0.1)
    assert retrieval_at_1(references, references[:1].expand(10, 5)).item() == pytest.approx(0.1)


def test_a_feature_s_scale_does_not_matter():
    generator = torch.Generator().manual_seed(2)
    references, generated = torch.randn(32, 6, generator=generator), torch.randn(32, 6, generator=generator)
    generated = 0.7 * references + 0.5 * generated
    scale = torch.tensor([1e-3, 1.0, 1e3, 5.0, 0.1, 42.0])
    share = retrieval_at_1(generated, references)
    assert 0.1 < share < 1.0
    assert retrieval_at_1(generated * scale + 3, references * scale + 3) == share


def test_batches_make_the_whole_and_times_chance_is_the_share_times_n():
    references = _bytes(24)
    generated = torch.cat([references[:12], _bytes(12, seed=1)])
    metric = CaptionRetrieval(RandomConvFeatures())
    for own, reference in zip(generated.split(5), references.split(5), strict=True):
        metric.update(own, reference)
    result = metric.compute()
    features = metric.extractor
    assert result["retrieval_at_1"] == retrieval_at_1(features(generated), features(references))
    assert result["retrieval_at_1"] >= 0.5
    assert result["retrieval_times_chance"] == 24 * result["retrieval_at_1"]
