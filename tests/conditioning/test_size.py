import hydra
import pytest
import torch

from ldm_train.conditioning import CombinedConditioner, SizeConditioner
from ldm_train.nn.embedding import sinusoidal_embedding

from ..conftest import composed
from .toy import CAPTIONS, batch, first_stage


def test_six_numbers_stand_side_by_side_each_embedded_like_a_time():
    vector = SizeConditioner(48).eval()(batch(), None).vector
    numbers = torch.tensor([[512, 768, 0, 4, 16, 16], [16, 16, 0, 0, 16, 16], [300, 200, 4, 0, 16, 16]])
    each = [sinusoidal_embedding(column, 8) for column in numbers.unbind(1)]
    assert torch.equal(vector[:3], torch.cat(each, 1))
    assert vector[0, :3].tolist() == pytest.approx(
        [torch.tensor(512 * 0.1**i).cos().item() for i in range(3)], abs=1e-4
    )


def test_each_number_moves_its_own_channels():
    conditioner, plain = SizeConditioner(48).eval(), batch()
    before = conditioner(plain, None).vector.view(4, 6, 8)
    for name, column, slot in (("original_size", 0, 0), ("original_size", 1, 1), ("crop", 0, 2), ("crop", 1, 3)):
        changed = {**plain, name: plain[name].clone()}
        changed[name][:, column] += 1
        moved = (conditioner(changed, None).vector.view(4, 6, 8) != before).any(-1)
        assert moved.sum(0).tolist() == [4 if i == slot else 0 for i in range(6)]
    tall = {**plain, "image": torch.zeros(4, 3, 24, 16)}
    assert (conditioner(tall, None).vector.view(4, 6, 8) != before).any(-1).sum(0).tolist() == [0, 0, 0, 0, 4, 0]


def test_what_is_not_known_is_the_best_in_generation_and_an_error_in_training():
    conditioner, bare = SizeConditioner(48).eval(), batch()
    ideal = {**bare, "original_size": torch.full((4, 2), 16), "crop": torch.zeros(4, 2, dtype=torch.int64)}
    del bare["original_size"], bare["crop"]
    assert torch.equal(conditioner(bare, None).vector, conditioner(ideal, None).vector)
    with pytest.raises(ValueError, match=r"no `original_size` or no `crop`; allowed are .*; change `data`"):
        conditioner.train()(bare, None)
    assert conditioner.describe(ideal)[0] == "16 x 16 px, cut at left 0 and top 0, shown at 16 x 16"


def test_sizes_stand_beside_the_caption():
    cfg = composed("conditioner=text_and_size")
    conditioner = hydra.utils.instantiate(cfg.conditioner, _convert_="all").eval()
    assert isinstance(conditioner, CombinedConditioner)
    size, given = conditioner.parts["size"], conditioner(batch(), first_stage())
    assert given.vector.shape == (len(CAPTIONS), cfg.conditioner.vector_dim) == (4, 192 + 1536)
    assert torch.equal(given.vector[:, 192:], size(batch(), None).vector)
    assert (size.vector_dim, size.drop_rate) == (1536, 0.0)


@pytest.mark.parametrize("width", [0, 250, 1530])
def test_a_width_that_six_numbers_cannot_fill_is_refused(width):
    with pytest.raises(ValueError, match=rf"vector_dim is {width}; allowed are multiples of 12, .* change `cond"):
        SizeConditioner(width)
