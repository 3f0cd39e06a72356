import pytest
import torch
from torch import nn

from ldm_train.diffusion import (
    P2,
    PREDICTIONS,
    Debiased,
    Denoiser,
    DiffusionObjective,
    LossAwareTimes,
    LowDiscrepancyTimes,
    MinSNR,
    Uniform,
    VariationalBound,
    linear_schedule,
)
from ldm_train.diffusion.likelihood import bound_term
from ldm_train.diffusion.process import add_noise
from ldm_train.randomness import SampleKeys, Stream, normal

WEIGHTINGS = [MinSNR(), P2(), Debiased(), VariationalBound()]
SHAPE = (2, 4, 4)


def keys(count, first=0, epoch=0, seed=0):
    ids = torch.arange(first, first + count)
    return SampleKeys(seed, epoch, ids, ids)


def part(of, where):
    return of._replace(sample_id=of.sample_id[where], position=of.position[where])


class Constant(nn.Module):
    """Says the same of everything, and remembers what it was shown."""

    def __init__(self, *values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x_t, t, conditioning):
        self.seen = x_t
        return torch.cat([value.expand_as(x_t) for value in self.values], dim=1)


class Fixed(LowDiscrepancyTimes):
    """Times that are given."""

    def __init__(self, t):
        super().__init__()
        self.t = t

    def draw(self, keys, num_steps):
        return super().draw(keys, num_steps)._replace(t=self.t)


def drawn(schedule, t, of, x_0):
    """x_t and noise of L_simple at times t."""
    noise = normal(of.seed, of.epoch, of.sample_id, Stream.NOISE, tuple(x_0.shape[1:]))
    return add_noise(schedule, x_0, noise, t), noise


@pytest.fixture
def x_0(rng):
    return torch.randn(64, *SHAPE, generator=rng)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", [None, *WEIGHTINGS], ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("times", [None, LowDiscrepancyTimes()], ids=lambda t: type(t).__name__)
def test_a_perfect_denoiser_has_no_loss(prediction, weighting, times, perfect, nothing, x_0):
    denoiser = perfect(x_0, linear_schedule(), prediction)
    loss = DiffusionObjective(weighting, times)(denoiser, x_0, nothing, keys(64))
    assert float(loss.per_example.max()) < 1e-6


def test_predicting_no_noise_costs_its_variance(nothing, rng):
    x_0 = torch.randn(512, 3, 8, 8, generator=rng)
    loss = DiffusionObjective()(Denoiser(Constant(0.0), linear_schedule()), x_0, nothing, keys(512))
    assert float(loss.square_error.mean()) == pytest.approx(1.0, abs=4 * (2 / x_0.numel()) ** 0.5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", [Uniform(), *WEIGHTINGS], ids=lambda w: type(w).__name__)
def test_the_loss_is_the_weighted_mean_square_error_of_the_prediction(prediction, weighting, nothing, x_0):
    schedule = linear_schedule()
    denoiser = Denoiser(Constant(0.3), schedule, prediction)
    loss = DiffusionObjective(weighting)(denoiser, x_0, nothing, keys(64))
    x_t, noise = drawn(schedule, loss.t, keys(64), x_0)
    assert torch.equal(denoiser.network.seen, x_t)
    error = (0.3 - denoiser.target(x_0, noise, loss.t)).square().flatten(1).mean(1)
    weight = weighting.weight(schedule, prediction)[loss.t].float()
    torch.testing.assert_close(loss.square_error, error)
    torch.testing.assert_close(loss.per_example, weight * error)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: type(w).__name__)
def test_one_mistake_costs_the_same_in_every_parameterisation(prediction, weighting, nothing, x_0):
    """The weighted loss is w(t) times the square error of the x_0 that the prediction implies."""
    schedule = linear_schedule()
    denoiser = Denoiser(Constant(0.3), schedule, prediction)
    loss = DiffusionObjective(weighting)(denoiser, x_0, nothing, keys(64))
    x_t, _ = drawn(schedule, loss.t, keys(64), x_0)
    error = (denoiser(x_t, loss.t, nothing).x_0 - x_0).double().square().flatten(1).mean(1)
    expected = weighting.weight(schedule, "x_0")[loss.t] * error
    torch.testing.assert_close(loss.per_example.double(), expected, rtol=2e-3, atol=1e-6)


def test_one_objective_weighs_each_denoiser_by_its_own_schedule_and_prediction(nothing, x_0):
    objective = DiffusionObjective(MinSNR())
    denoisers = [Denoiser(Constant(0.3), linear_schedule(steps), p) for steps in (10, 1000) for p in PREDICTIONS]
    for denoiser in (*denoisers, *denoisers):
        fresh = DiffusionObjective(MinSNR())(denoiser, x_0, nothing, keys(64))
        assert torch.equal(objective(denoiser, x_0, nothing, keys(64)).per_example, fresh.per_example)


@pytest.mark.parametrize("variance", ["posterior", "learned"])
@pytest.mark.parametrize("times", [None, LowDiscrepancyTimes()], ids=lambda t: type(t).__name__)
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(variance, times, nothing, x_0):
    bound_weight = 0.001 if variance == "learned" else None
    objective = DiffusionObjective(None, times, 0.1, 0.1, bound_weight)
    values = (0.1, 0.2) if variance == "learned" else (0.1,)
    denoiser = Denoiser(Constant(*values), linear_schedule(), variance=variance)
    of = keys(64, epoch=2, seed=3)
    whole = objective(denoiser, x_0, nothing, of)
    for rank in range(2):
        mine = slice(rank, None, 2)
        half = objective(denoiser, x_0[mine], nothing, part(of, mine))
        assert torch.equal(half.t, whole.t[mine])
        torch.testing.assert_close(half.per_example, whole.per_example[mine], rtol=1e-6, atol=1e-7)
    other_epoch = objective(denoiser, x_0, nothing, of._replace(epoch=3))
    assert not bool((other_epoch.t == whole.t).all())


@pytest.mark.parametrize("training", [True, False])
def test_offset_noise_moves_whole_channels_of_what_is_seen_and_of_the_target(training, nothing, x_0):
    schedule, network = linear_schedule(), Constant(0.0)
    loss = DiffusionObjective(offset_noise=0.2).train(training)(Denoiser(network, schedule), x_0, nothing, keys(64))
    plain, noise = drawn(schedule, loss.t, keys(64), x_0)
    moved = network.seen - plain
    # constant over each channel, and sigma_t 0.2 times a standard normal draw
    offset = moved / (0.2 * schedule.scales(loss.t, 4)[1])
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=3e-3)
    offset = offset.mean((2, 3))
    assert float(offset.mean()) == pytest.approx(0.0, abs=4 / 128**0.5)
    assert float(offset.std()) == pytest.approx(1.0, abs=4 / 256**0.5)
    expected = (noise + 0.2 * offset[..., None, None]).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.square_error, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perturbed_input_keeps_the_target_of_the_noise(prediction, nothing, x_0):
    schedule, objective = linear_schedule(), DiffusionObjective(input_perturbation=0.1)
    denoiser = Denoiser(Constant(0.0), schedule, prediction)
    loss = objective(denoiser, x_0, nothing, keys(64))
    plain, noise = drawn(schedule, loss.t, keys(64), x_0)
    expected = denoiser.target(x_0, noise, loss.t).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.square_error, expected)
    xi = (denoiser.network.seen - plain) / (0.1 * schedule.scales(loss.t, 4)[1])
    assert float(xi.std()) == pytest.approx(1.0, abs=4 / (2 * xi.numel()) ** 0.5)
    assert abs(float((xi * noise).mean())) < 4 / xi.numel() ** 0.5  # noise of its own
    objective.eval()(denoiser, x_0, nothing, keys(64))
    assert torch.equal(denoiser.network.seen, plain)


@pytest.mark.parametrize("decoder", ["gaussian", "discrete"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_hybrid_loss_is_the_simple_one_and_the_bound(prediction, decoder, nothing, x_0):
    schedule = linear_schedule(20)
    denoiser = Denoiser(Constant(0.3, -0.4), schedule, prediction, "learned")
    loss = DiffusionObjective(bound_weight=0.05, decoder=decoder)(denoiser, x_0, nothing, keys(64))
    x_t, _ = drawn(schedule, loss.t, keys(64), x_0)
    estimate = denoiser(x_t, loss.t, nothing)
    term = bound_term(schedule, "learned", x_0, loss.t, estimate.x_0, estimate.variance_fraction, decoder)
    torch.testing.assert_close(loss.per_example - loss.square_error, 0.05 * 20 * term, rtol=1e-3, atol=1e-4)
    assert int((loss.t == 0).sum()) > 0  # the decoder was among them


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_teaches_the_variance_and_the_square_error_the_mean(prediction, nothing, x_0):
    def gradients(variance, *values):
        denoiser = Denoiser(Constant(*values), linear_schedule(), prediction, variance)
        bound_weight = 0.001 if denoiser.variance == "learned" else None
        DiffusionObjective(bound_weight=bound_weight)(denoiser, x_0, nothing, keys(64)).per_example.mean().backward()
        return denoiser.network.values.grad

    (alone,) = gradients("posterior", 0.3)
    mean, fraction = gradients("learned", 0.3, 0.2)
    assert float(mean) == pytest.approx(float(alone), rel=1e-6)
    assert float(fraction) != 0


def test_the_bound_is_least_at_the_true_variance(gaussian, nothing):
    """Standard normal data, perfectly denoised: beta is the variance of every reverse step (fraction 1)."""
    x_0 = torch.randn(4096, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    schedule = linear_schedule(50)
    perfect = gaussian(schedule, 0.0, 1.0)

    class Network(nn.Module):
        def __init__(self, fraction):
            super().__init__()
            self.fraction = fraction

        def forward(self, x_t, t, conditioning):
            return torch.cat([perfect(x_t, t, conditioning).x_0, torch.full_like(x_t, 2 * self.fraction - 1)], dim=1)

    def bound(fraction):
        denoiser = Denoiser(Network(fraction), schedule, "x_0", "learned")
        loss = DiffusionObjective(bound_weight=0.001)(denoiser, x_0, nothing, keys(4096))
        inside = loss.t > 0
        return float((loss.per_example - loss.square_error)[inside].mean())

    assert bound(1.0) < min(bound(0.8), bound(1.2))


def test_times_drawn_too_often_count_for_less_and_learn_from_the_loss_without_its_weight(nothing, x_0):
    times = LossAwareTimes(8, history=1)
    objective = DiffusionObjective(MinSNR(), times)
    denoiser = Denoiser(Constant(0.3), linear_schedule(8), "v")
    fixed = DiffusionObjective(MinSNR(), Fixed(torch.arange(8).repeat(8)))
    everywhere = fixed(denoiser, x_0, nothing, keys(64))
    times.observe(everywhere.t, everywhere.per_example, keys(64))
    p, before = times.probabilities(), times.seen.sum()

    loss = objective(denoiser, x_0, nothing, keys(64, epoch=1))
    unweighted = MinSNR().weight(denoiser.schedule, "v")[loss.t] * loss.square_error
    torch.testing.assert_close(loss.per_example.double(), unweighted / (8 * p[loss.t]), rtol=1e-5, atol=0)
    assert float(p.max() / p.min()) > 1.5
    assert int(times.seen.sum() - before) == 64
    last = {t: float(value) for t, value in zip(loss.t.tolist(), unweighted, strict=True)}
    for t, value in last.items():
        assert float(times.losses[t, 0]) == pytest.approx(value, rel=1e-5)

    objective.eval()(denoiser, x_0, nothing, keys(64, epoch=2))
    assert int(times.seen.sum() - before) == 64


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset_noise", -0.1), ("input_perturbation", -0.1), ("bound_weight", 0.0), ("decoder", "uniform")],
)
def test_what_is_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"^{key} is .*; allowed are .*; change `objective.{key}`$"):
        DiffusionObjective(**{key: value})


def denoiser_of(variance="posterior", zero_terminal_snr=False, prediction="v"):
    return Denoiser(Constant(0.0), linear_schedule(zero_terminal_snr=zero_terminal_snr), prediction, variance)


@pytest.mark.parametrize(
    ("objective", "denoiser", "key"),
    [
        (DiffusionObjective(), denoiser_of("learned"), "objective.bound_weight"),
        (DiffusionObjective(bound_weight=0.001), denoiser_of("beta"), "objective.bound_weight"),
        (DiffusionObjective(VariationalBound("beta")), denoiser_of("posterior"), "objective.weighting.variance"),
        *[
            (DiffusionObjective(weighting), denoiser_of("beta", True, prediction), "schedule.zero_terminal_snr")
            for weighting in (MinSNR(), P2(), Debiased())
            for prediction in ("v", "x_0")
        ],
    ],
)
def test_what_would_be_trained_in_part_or_never_is_refused(objective, denoiser, key):
    with pytest.raises(ValueError, match=r"allowed") as error:
        objective.check(denoiser)
    assert f"`{key}" in str(error.value)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_uniform_weights_and_the_bound_reach_every_time(variance):
    for weighting in (Uniform(), VariationalBound(variance)):
        DiffusionObjective(weighting).check(denoiser_of(variance, zero_terminal_snr=True))
    DiffusionObjective(MinSNR()).check(denoiser_of(variance))
    DiffusionObjective(bound_weight=0.1).check(denoiser_of("learned", zero_terminal_snr=True))
