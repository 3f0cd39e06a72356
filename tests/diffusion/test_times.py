import math

import pytest
import torch

from ldm_train.diffusion import LossAwareTimes, LowDiscrepancyTimes, UniformTimes
from ldm_train.randomness import SampleKeys
from tests.ranks import run_ranks

FINE = 2**31  # so many times that they are the points themselves


def keys(count, epoch=0, seed=0, first=0):
    position = torch.arange(first, first + count)
    return SampleKeys(seed, epoch, position * 7 + 3, position)


def part(of, where):
    return of._replace(sample_id=of.sample_id[where], position=of.position[where])


def warm(times, losses=None):
    """Show losses (H, T) of every time, or ones."""
    num_steps, history = times.losses.shape
    losses = torch.ones(history, num_steps, dtype=torch.float64) if losses is None else losses
    for row in losses:
        times.observe(torch.arange(num_steps), row, keys(num_steps))
    return times


KINDS = [UniformTimes(), LowDiscrepancyTimes(), LossAwareTimes(1000), warm(LossAwareTimes(1000, 1))]


@pytest.mark.parametrize("times", KINDS, ids=lambda times: type(times).__name__)
def test_times_are_uniform_where_no_loss_says_otherwise(times):
    t, weight = times.draw(keys(200_000), 1000)
    assert (int(t.min()), int(t.max())) == (0, 999)
    assert (torch.bincount(t // 100) - 20_000).abs().max() < 4.5 * 18_000**0.5
    torch.testing.assert_close(weight, torch.ones_like(weight))


@pytest.mark.parametrize("times", KINDS, ids=lambda times: type(times).__name__)
def test_draws_do_not_depend_on_how_the_batch_is_split(times):
    whole = keys(64, epoch=3)
    t, weight = times.draw(whole, 1000)
    for rank in range(3):
        mine = times.draw(part(whole, slice(rank, None, 3)), 1000)
        assert torch.equal(mine.t, t[rank::3])
        assert torch.equal(mine.weight, weight[rank::3])
    for other in (keys(64, epoch=4), keys(64, epoch=3, seed=1)):
        assert float((times.draw(other, 1000).t == t).float().mean()) < 0.1


@pytest.mark.parametrize("count", [1, 2, 7, 64, 500, 2048])
@pytest.mark.parametrize("first", [0, 1, 12_345, 2**31 - 700, 2**40 + 11])
def test_any_run_of_positions_is_evenly_spread(count, first):
    """No gap on the circle is twice as wide as those of a regular grid; independent draws leave log(count) times."""
    points = LowDiscrepancyTimes().draw(keys(count, first=first), FINE).t.sort().values
    gaps = torch.cat([points, points[:1] + FINE]).diff()
    assert float(gaps.max()) * count / FINE < 2


def test_batches_hold_each_part_of_the_times_about_equally_often():
    """Of any 64 consecutive samples 8 +- 2 in each eighth; independently drawn, the spread would be 2.6."""
    t = LowDiscrepancyTimes().draw(keys(4096), 1000).t
    counts = torch.stack([torch.bincount(window // 125, minlength=8) for window in t.unfold(0, 64, 13)])
    assert int(counts.min()) >= 6
    assert int(counts.max()) <= 10
    independent = UniformTimes().draw(keys(4096), 1000).t
    assert float(torch.stack([torch.bincount(w // 125, minlength=8) for w in independent.unfold(0, 64, 13)]).min()) < 5


def test_the_recurrence_is_the_golden_one_and_exact_at_any_position():
    golden = (math.sqrt(5) - 1) / 2
    for first in (0, 10**6, 10**12):
        points = LowDiscrepancyTimes().draw(keys(1000, first=first), FINE).t
        steps = (points.diff() % FINE).double() / FINE
        torch.testing.assert_close(steps, torch.full_like(steps, golden), rtol=0, atol=2**-30)
    near, far = (LowDiscrepancyTimes().draw(keys(9, first=first), FINE).t for first in (0, 2**32))
    assert torch.equal(near, far)  # the words' period


def test_a_sample_s_time_is_uniform_over_the_epochs():
    t = torch.cat([LowDiscrepancyTimes().draw(keys(1, epoch=epoch, first=5), 8).t for epoch in range(2000)])
    assert (torch.bincount(t, minlength=8) - 250).abs().max() < 4.5 * (250 * 7 / 8) ** 0.5


def test_times_are_drawn_in_proportion_to_the_root_mean_square_of_their_losses(rng):
    losses = torch.rand(4, 20, generator=rng, dtype=torch.float64) * torch.arange(20)
    times = warm(LossAwareTimes(20, history=4, uniform_share=0.1), losses)
    size = losses.square().mean(0).sqrt()
    expected = 0.9 * size / size.sum() + 0.1 / 20
    torch.testing.assert_close(times.probabilities(), expected)
    t, weight = times.draw(keys(100_000), 20)
    counts = torch.bincount(t, minlength=20).double()
    assert bool(((counts - 1e5 * expected).abs() < 4.5 * (1e5 * expected).sqrt()).all())
    torch.testing.assert_close(weight.double(), 1 / (20 * expected[t]), rtol=1e-6, atol=0)


def test_the_weighted_loss_is_that_of_uniform_times_with_less_variance(rng):
    level = torch.rand(50, generator=rng, dtype=torch.float64) ** 4
    times = warm(LossAwareTimes(50, history=2), level.expand(2, 50))
    p = times.probabilities()
    torch.testing.assert_close((p * level / (50 * p)).sum(), level.mean())  # unbiased, whatever p is
    t, weight = times.draw(keys(50_000), 50)
    estimates, uniform = weight * level[t], level[UniformTimes().draw(keys(50_000), 50).t]
    assert float(estimates.mean()) == pytest.approx(float(level.mean()), rel=0.005)
    assert float(estimates.std()) < 0.1 * float(uniform.std())


def test_nothing_is_preferred_before_every_time_has_its_history():
    times = warm(LossAwareTimes(10, history=3), torch.arange(20.0).view(2, 10))
    times.observe(torch.arange(9), torch.ones(9), keys(9))
    torch.testing.assert_close(times.probabilities(), torch.full((10,), 0.1, dtype=torch.float64))
    times.observe(torch.tensor([9]), torch.ones(1), keys(1))
    assert float(times.probabilities().max()) > 0.11


def test_the_last_losses_of_each_time_are_remembered(rng):
    """Against a plain list for each time, with more losses of a time in a batch than are kept."""
    times = LossAwareTimes(5, history=3)
    remembered = {t: [] for t in range(5)}
    for step in range(12):
        t = torch.randint(0, 5, (17,), generator=rng)
        loss = torch.rand(17, generator=rng)
        order = torch.randperm(17, generator=rng)
        batch = keys(17, first=17 * step)
        for time, value in zip(t.tolist(), loss.tolist(), strict=True):
            remembered[time] = [*remembered[time], value][-3:]
        times.observe(t[order], loss[order], part(batch, order))  # as several processes would hand them in
        for time, values in remembered.items():
            kept = times.losses[time][: len(values)]
            torch.testing.assert_close(kept.sort().values, torch.tensor(values, dtype=torch.float64).sort().values)
    assert int(times.seen.sum()) == 12 * 17


def test_a_module_of_half_precision_learns_the_same_with_fewer_digits(rng):
    losses = torch.rand(2, 20, generator=rng, dtype=torch.float64)
    exact, half = (warm(LossAwareTimes(20, history=2).to(dtype), losses) for dtype in (torch.float64, torch.bfloat16))
    torch.testing.assert_close(half.probabilities(), exact.probabilities(), rtol=0.01, atol=0)


def test_losses_that_are_no_numbers_are_passed_over():
    times = warm(LossAwareTimes(4, history=2))
    before = times.probabilities()
    times.observe(torch.tensor([0, 1, 2]), torch.tensor([torch.nan, torch.inf, -torch.inf]), keys(3))
    assert torch.equal(times.probabilities(), before)
    assert times.seen.tolist() == [2, 2, 2, 2]


def test_losses_of_zero_prefer_nothing():
    times = warm(LossAwareTimes(4, history=1), torch.zeros(1, 4))
    torch.testing.assert_close(times.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))


def test_evaluation_draws_uniform_times_and_learns_nothing():
    times = warm(LossAwareTimes(100, history=1), torch.arange(100.0)[None])
    before = {name: value.clone() for name, value in times.state_dict().items()}
    times.eval()
    times.observe(torch.arange(100), torch.full((100,), 50.0), keys(100))
    assert all(torch.equal(value, before[name]) for name, value in times.state_dict().items())
    drawn, uniform = times.draw(keys(64), 100), UniformTimes().draw(keys(64), 100)
    assert torch.equal(drawn.t, uniform.t)
    assert torch.equal(drawn.weight, uniform.weight)
    assert not torch.equal(times.train().draw(keys(64), 100).t, uniform.t)


def test_a_checkpoint_resumes_exactly(rng):
    def go_on(times, steps):
        drawn = []
        for step in steps:
            batch = keys(32, first=32 * step)
            drawn.append(times.draw(batch, 8).t)
            times.observe(drawn[-1], (drawn[-1].float() + 1) * (step + 1), batch)
        return drawn

    unbroken, resumed = LossAwareTimes(8, history=2), LossAwareTimes(8, history=2)
    go_on(unbroken, range(10))
    resumed.load_state_dict(unbroken.state_dict())
    expected, found = go_on(unbroken, range(10, 15)), go_on(resumed, range(10, 15))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert float(resumed.probabilities().max()) > 0.15  # it is warm


def _trained(rank=0, world=1):
    """What was drawn and learned in some steps on a part of the global batch."""
    times, drawn = LossAwareTimes(6, history=3), []
    for step in range(8):
        batch = part(keys(30, first=30 * step), slice(rank, None, world))
        drawn.append(times.draw(batch, 6))
        times.observe(drawn[-1].t, (drawn[-1].t + 1) / (batch.position + 1.0), batch)
    return drawn, times.state_dict()


def _one_rank(rank, init_file, world):
    drawn, state = _trained()  # there is no group yet
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    mine, learned = _trained(rank, world)
    torch.distributed.destroy_process_group()
    assert all(torch.equal(learned[name], state[name]) for name in state)
    for found, whole in zip(mine, drawn, strict=True):
        assert torch.equal(found.t, whole.t[rank::world])
        assert torch.equal(found.weight, whole.weight[rank::world])
    assert float(mine[-1].weight.max() - mine[-1].weight.min()) > 0.1, "the times never became loss-aware"


@pytest.mark.distributed
def test_two_ranks_learn_what_one_process_learns(tmp_path):
    run_ranks(_one_rank, tmp_path / "rendezvous", 2)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 10, "history": 0}, "history"),
        ({"num_steps": 10, "uniform_share": 0.0}, "uniform_share"),
        ({"num_steps": 10, "uniform_share": 1.5}, "uniform_share"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, key):
    with pytest.raises(ValueError, match=rf"^{key} is .*; allowed are .*; change `objective.times.{key}`$"):
        LossAwareTimes(**arguments)


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"num_steps is 10; allowed are 1000, that of .*`objective.times.num_steps`"):
        LossAwareTimes(10).draw(keys(4), 1000)
