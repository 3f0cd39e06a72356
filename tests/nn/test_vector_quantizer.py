import pytest
import torch
from torch.nn.functional import normalize

from ldm_train.nn import VectorQuantizer
from ldm_train.nn.codebook import perplexity
from ldm_train.nn.vector_quantizer import _rotated


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantizer(codebook_size=16, latent_channels=3, **options):
    """One whose codes are spread like the latents of these tests, not within 1/K of zero."""
    quantizer = VectorQuantizer(codebook_size, latent_channels, **options)
    if options.get("initialisation") != "k_means":
        quantizer.set_codebook(_normal(codebook_size, latent_channels, seed=99))
    return quantizer


def _rows(z):
    return z.movedim(1, -1).flatten(0, -2)


@pytest.fixture
def z():
    return _normal(2, 3, 4, 5)


@pytest.fixture
def noise():
    return _normal(2, 3, 4, 5, seed=1)


class TestQuantisation:
    @pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
    def test_the_decoder_reads_codes_to_the_last_bit(self, z, gradient):
        quantizer = _quantizer(gradient=gradient)
        result = quantizer(z, None)
        assert torch.equal(result.z, quantizer.codebook[result.indices].movedim(-1, 1))

    def test_no_code_is_nearer(self, z):
        quantizer = _quantizer()
        distances = (_rows(z)[:, None] - quantizer.codebook).norm(dim=2)
        assert torch.equal(quantizer(z, None).indices.flatten(), distances.argmin(dim=1))

    def test_projection_is_what_the_decoder_was_trained_on_and_keeps_codes(self, z):
        quantizer = _quantizer()
        codes = quantizer.project(quantizer.mode(z))
        assert torch.equal(codes, quantizer(z, None).z)
        assert torch.equal(quantizer.project(codes), codes)
        indices = quantizer.indices(z)
        assert torch.equal(quantizer.indices(quantizer.codes(indices)), indices)

    def test_the_mode_is_not_quantised_and_has_no_variance(self, z):
        assert torch.equal(_quantizer().mode(z), z)
        assert torch.equal(_quantizer().variance(z), torch.zeros_like(z))

    def test_cosine_distance_knows_directions_only(self, z):
        quantizer = _quantizer(distance="cosine")
        result = quantizer(z, None)
        cosines = _rows(normalize(z, dim=1)) @ normalize(quantizer.codebook, dim=1).T
        assert torch.equal(result.indices.flatten(), cosines.argmax(dim=1))
        scaled = z * torch.rand(2, 1, 4, 5) * 10
        torch.testing.assert_close(quantizer(scaled, None).loss, result.loss)
        for latents in (result.z, quantizer.mode(z), quantizer.project(z)):
            torch.testing.assert_close(latents.norm(dim=1), torch.ones(2, 4, 5))

    def test_autocast_changes_nothing(self, z, noise):
        quantizer, other = (_quantizer(update="ema", gradient="rotation", restart_after=2) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16):
            found = [quantizer(z, noise) for _ in range(4)][-1]
        expected = [other(z, noise) for _ in range(4)][-1]
        for name in ("z", "loss", "log", "indices"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
        torch.testing.assert_close(quantizer.state_dict(), other.state_dict(), rtol=0, atol=0)


class TestLoss:
    def test_both_terms_in_closed_form(self, z):
        quantizer = _quantizer(weight=2.0, commitment_weight=0.25)
        result = quantizer(z, None)
        distance = (z - result.z).square().flatten(1)
        torch.testing.assert_close(result.loss, 2.0 * 1.25 * distance.mean(1))
        torch.testing.assert_close(result.log["commitment"], distance.mean())
        summed = _quantizer(weight=2.0, commitment_weight=0.25, reduction="sum")
        torch.testing.assert_close(summed(z, None).loss, 2.0 * 1.25 * distance.sum(1))

    def test_the_commitment_weight_is_on_the_latents_and_not_on_the_codes(self, z):
        def gradients(commitment_weight):
            quantizer, latents = _quantizer(commitment_weight=commitment_weight), z.clone().requires_grad_()
            quantizer(latents, None).loss.sum().backward()
            return latents.grad, quantizer.codebook.grad

        (latents_0, codes_0), (latents_1, codes_1), (latents_3, codes_3) = map(gradients, (0.0, 1.0, 3.0))
        assert not latents_0.any()
        torch.testing.assert_close(latents_3, 3 * latents_1)
        assert codes_0.any()
        assert torch.equal(codes_0, codes_1)
        assert torch.equal(codes_1, codes_3)

    def test_moving_averages_leave_the_commitment_alone(self, z):
        quantizer = _quantizer(update="ema", commitment_weight=0.5)
        result = quantizer(z.requires_grad_(), None)
        torch.testing.assert_close(result.loss, 0.5 * (z - result.z).square().flatten(1).mean(1))
        result.loss.sum().backward()
        assert z.grad.any()
        assert quantizer.codebook.grad is None

    def test_the_codebook_is_the_only_parameter(self):
        for update in ("loss", "ema"):
            assert [(n, p.shape) for n, p in _quantizer(update=update).named_parameters()] == [("codebook", (16, 3))]


class TestGradient:
    def test_straight_through_copies_it(self, z):
        _quantizer()(z.requires_grad_(), None).z.backward(_normal(2, 3, 4, 5, seed=2))
        assert torch.equal(z.grad, _normal(2, 3, 4, 5, seed=2))

    def test_rotation_turns_latents_into_codes(self, z):
        code = _normal(2, 3, 4, 5, seed=2)
        torch.testing.assert_close(_rotated(z, code), code)
        torch.testing.assert_close(_rotated(z, -2 * z), -2 * z)  # opposite directions: r is zero

    def test_rotation_keeps_angles_and_scales_lengths(self, z):
        """The gradient g at the code e and R^T g at z: equal angles, lengths in the ratio |e| / |z|."""
        quantizer, gradient = _quantizer(gradient="rotation"), _normal(2, 3, 4, 5, seed=2)
        code = quantizer(z.requires_grad_(), None).z
        code.backward(gradient)
        cosine = torch.nn.functional.cosine_similarity
        torch.testing.assert_close(cosine(z.grad, z), cosine(gradient, code), rtol=1e-4, atol=1e-5)
        ratio = code.norm(dim=1) / z.norm(dim=1)
        torch.testing.assert_close(z.grad.norm(dim=1), ratio * gradient.norm(dim=1), rtol=1e-4, atol=1e-5)

    def test_a_zero_latent_stays_finite(self):
        z = torch.zeros(1, 3, 1, 1, requires_grad=True)
        result = _quantizer(gradient="rotation")(z, None)
        (result.z.sum() + result.loss.sum()).backward()
        assert result.z.any()
        assert z.grad.abs().max() <= 10 * 3**0.5 + 1, "ten times what the straight path gives, and the commitment"

    @pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
    def test_the_decoder_does_not_move_the_codes(self, z, gradient):
        quantizer = _quantizer(gradient=gradient)
        quantizer(z.requires_grad_(), None).z.sum().backward()
        assert z.grad.any()
        assert quantizer.codebook.grad is None


class TestMovingAverages:
    def test_closed_form_after_equal_steps(self, z, noise):
        """n steps with the same codes: N = d^n + (1 - d^n) n_k and m = d^n e_k + (1 - d^n) s_k."""
        quantizer, decay, steps = _quantizer(codebook_size=2, update="ema", ema_decay=0.8), 0.8, 5
        quantizer.set_codebook(torch.tensor([[9.0, 0, 0], [-9.0, 0, 0]]))  # far apart: the codes of z do not change
        z[:, 0] += torch.tensor([4.0, -4.0]).view(2, 1, 1)
        start, rows = quantizer.codebook.clone(), _rows(z)
        for _ in range(steps):
            indices = quantizer(z, noise).indices.flatten()
        counts = torch.stack([(indices == k).sum() for k in range(2)])[:, None]
        sums = torch.stack([rows[indices == k].sum(0) for k in range(2)])
        old = decay**steps
        expected = (old * start + (1 - old) * sums) / (old + (1 - old) * counts)
        torch.testing.assert_close(quantizer.codebook.detach(), expected)

    def test_without_memory_codes_are_the_means_of_their_latents(self, z, noise):
        quantizer = _quantizer(update="ema", ema_decay=0.0)
        before = quantizer.codebook.clone()
        indices = quantizer(z, noise).indices.flatten()
        for k in range(16):
            taken = _rows(z)[indices == k]
            torch.testing.assert_close(quantizer.codebook[k], taken.mean(0) if len(taken) else before[k])

    def test_a_code_without_latents_stays_for_ever(self, z, noise):
        quantizer = _quantizer(codebook_size=2, update="ema", ema_decay=0.5)
        quantizer.set_codebook(torch.tensor([[0.0, 0, 0], [50.0, 60, 70]]))
        for _ in range(300):  # 0.5^300 is nothing in float32
            quantizer(z, noise)
        assert quantizer.ema_count[1] == 0
        assert quantizer.codebook[1].tolist() == [50.0, 60.0, 70.0]


class TestInitialisation:
    def test_as_many_codes_as_latents_are_the_latents(self, z, noise):
        result = _quantizer(codebook_size=40, initialisation="k_means")(z, noise)
        assert torch.equal(result.z, z)
        assert result.indices.unique().numel() == 40

    def test_k_means_happens_once_and_travels(self, z, noise):
        quantizer = _quantizer(initialisation="k_means")
        assert not quantizer.initialised
        quantizer(z, noise)
        placed = quantizer.codebook.clone()
        copy = VectorQuantizer(16, 3, initialisation="k_means")
        copy.load_state_dict(quantizer.state_dict())
        for module in (quantizer, copy):
            module(z + 5, noise)
            assert torch.equal(module.codebook, placed)

    def test_k_means_fits_better_than_its_own_random_start(self, z, noise):
        fitted, drawn = _quantizer(initialisation="k_means"), _quantizer()
        drawn.set_codebook(_rows(z)[noise.double().sum(1).flatten().topk(16).indices])
        fitted(z, noise)
        assert fitted.eval()(z, None).log["commitment"] < 0.9 * drawn(z, None).log["commitment"]

    def test_codes_beyond_the_latents_keep_their_start(self, z, noise):
        quantizer = _quantizer(codebook_size=50, initialisation="k_means")
        before = quantizer.codebook.clone()
        quantizer(z, noise)
        assert torch.equal(quantizer.codebook[40:], before[40:])
        assert not torch.any(quantizer.codebook[:40] == before[:40])

    def test_uniform_codes_lie_in_their_cube_or_on_the_sphere(self):
        torch.manual_seed(0)
        cube = VectorQuantizer(1000, 3).codebook * 1000
        assert 0.99 < cube.abs().max() <= 1
        assert abs(cube.mean()) < 0.05
        torch.testing.assert_close(VectorQuantizer(50, 3, distance="cosine").codebook.norm(dim=1), torch.ones(50))


class TestRestart:
    def _with_one_dead_code(self, **options):
        quantizer = _quantizer(codebook_size=3, restart_after=4, **options)
        quantizer.set_codebook(torch.tensor([[0.5, 0, 0], [-0.5, 0, 0], [100.0, 100, 100]]))
        return quantizer

    @pytest.mark.parametrize("update", ["loss", "ema"])
    def test_an_idle_code_moves_to_the_latent_that_the_noise_chooses(self, z, noise, update):
        quantizer = self._with_one_dead_code(update=update, ema_decay=0.999)
        for _ in range(4):
            quantizer(z, noise)
        assert quantizer.codebook[2].tolist() == [100.0, 100.0, 100.0]
        alive = quantizer.codebook[:2].clone()
        chosen = noise.double().sum(1).flatten().argmax()
        result = quantizer(z, noise)
        assert int(result.indices.flatten()[chosen]) == 2
        torch.testing.assert_close(result.z.movedim(1, -1).flatten(0, -2)[chosen], _rows(z)[chosen])
        if update == "loss":
            assert torch.equal(quantizer.codebook[:2], alive)

    def test_a_restarted_code_weighs_one_latent(self, z, noise):
        """Whatever its averages were: N = 1 and m = e before the step that placed it."""
        quantizer = self._with_one_dead_code(update="ema", ema_decay=0.5)
        for _ in range(5):
            indices = quantizer(z, noise).indices.flatten()
        rows, placed = _rows(z), _rows(z)[noise.double().sum(1).flatten().argmax()]
        taken = rows[indices == 2]
        torch.testing.assert_close(quantizer.codebook[2].detach(), (placed + taken.sum(0)) / (1 + len(taken)))

    def test_a_restarted_code_gets_its_time(self, z, noise):
        quantizer = self._with_one_dead_code()
        for _ in range(5):
            quantizer(z, noise)
        placed = quantizer.codebook[2].clone()
        for step in range(5):  # the latents have gone away from it
            assert torch.equal(quantizer.codebook[2], placed), step
            quantizer(torch.where(z[:, :1] > 0, 0.5, -0.5) * torch.tensor([1.0, 0, 0]).view(3, 1, 1), noise)
        assert not torch.equal(quantizer.codebook[2], placed)

    def test_more_idle_codes_than_latents_wait_for_the_next_step(self, noise):
        quantizer = _quantizer(codebook_size=10, restart_after=1)
        quantizer.set_codebook(torch.arange(10.0).view(-1, 1).expand(-1, 3) + 100)
        z = _normal(1, 3, 1, 4)
        for moved in (0, 0, 4, 8):
            assert int((quantizer.codebook < 50).all(1).sum()) == moved
            quantizer(z, noise[:1, :, :1, :4])

    def test_the_optimizer_still_gets_a_gradient_in_the_step_of_a_restart(self, z, noise):
        for distance in ("euclidean", "cosine"):
            quantizer = _quantizer(restart_after=1, distance=distance)
            for _ in range(3):
                quantizer.zero_grad()
                quantizer(z, noise).loss.sum().backward()
            assert quantizer.codebook.grad.any()


class TestRecord:
    def test_usage_counts_the_codes_of_the_window(self, noise):
        quantizer = _quantizer(codebook_size=4, usage_window=2)
        quantizer.set_codebook(torch.eye(4, 3) * 10)
        quantizer.codebook.data[3] = -10.0

        def usage(*codes):
            z = quantizer.codebook.detach()[list(codes)].T.reshape(1, 3, 1, -1)
            return float(quantizer(z, noise[:1, :, :1, : len(codes)]).log["codebook_usage"])

        assert [usage(0), usage(1), usage(1), usage(2, 3), usage(0)] == [0.25, 0.5, 0.25, 0.75, 0.75]

    def test_only_training_forwards_tell_of_the_codebook(self, z, noise):
        """A frozen one has counters that stand still: a figure of them would be an alarm without a cause."""
        assert VectorQuantizer(16, 3)(z, noise).log.keys() >= {"codebook_usage", "codebook_perplexity"}
        assert VectorQuantizer(16, 3).eval()(z, noise).log.keys() == {"commitment"}
        assert VectorQuantizer(16, 3)(z, None).log.keys() == {"commitment"}

    def test_a_restart_is_not_a_use(self, z, noise):
        """Else a codebook whose codes are restarted in vain would look healthy."""
        quantizer = _quantizer(restart_after=1, usage_window=3)
        # The latents run away from every code that was placed at them.
        results = [quantizer(z + 1000 * step, noise) for step in range(8)]
        assert max(result.indices.unique().numel() for result in results[3:]) > 8
        assert all(result.log["codebook_usage"] <= 4 / 16 for result in results[3:])

    def test_perplexity_is_that_of_the_batch(self, z, noise):
        result = _quantizer()(z, noise)
        counts = result.indices.flatten().bincount()
        torch.testing.assert_close(result.log["codebook_perplexity"], perplexity(counts).float())

    @pytest.mark.parametrize("mode", ["validation", "no noise"])
    def test_only_training_forwards_learn(self, z, noise, mode):
        quantizer = _quantizer(update="ema", initialisation="k_means", restart_after=1)
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        for _ in range(3):
            quantizer.train(mode == "no noise")(z, None if mode == "no noise" else noise)
        torch.testing.assert_close(quantizer.state_dict(), before, rtol=0, atol=0)

    @pytest.mark.parametrize("update", ["loss", "ema"])
    def test_no_training_forward_waits_for_the_device(self, z, noise, update):
        """On the meta device there are no values to wait for: reading one is an error."""
        quantizer = _quantizer(update=update, restart_after=1, gradient="rotation", distance="cosine")
        quantizer(z, noise)  # reads once that the codebook is initialised
        result = quantizer.to("meta")(z.to("meta"), noise.to("meta"))
        assert result.z.shape == z.shape

    def test_a_resumed_quantizer_continues_bit_for_bit(self, z, noise):
        options = {"update": "ema", "initialisation": "k_means", "restart_after": 2}
        straight, stopped = _quantizer(**options), _quantizer(**options)
        for step in range(6):
            if step == 3:
                state = stopped.state_dict()
                stopped = _quantizer(**options)
                stopped.load_state_dict(state)
            for module in (straight, stopped):
                module(z + step, noise + step)
        torch.testing.assert_close(stopped.state_dict(), straight.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, r"codebook_size is 0; allowed are whole numbers from 1"),
        ({"restart_after": 0}, r"restart_after is 0"),
        ({"commitment_weight": -1.0}, r"commitment_weight is -1.0; allowed are numbers from 0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0; allowed are numbers from 0 to below 1"),
        ({"update": "adam"}, r"update is 'adam'; allowed are loss and ema"),
        ({"gradient": "none"}, r"allowed are straight_through and rotation"),
        ({"distance": "l1"}, r"allowed are euclidean and cosine"),
        ({"initialisation": "zeros"}, r"allowed are uniform and k_means"),
    ],
)
def test_bad_options_are_refused(options, message):
    key = next(iter(options))
    with pytest.raises(ValueError, match=rf"{message}.*change `autoencoder\.regularizer\.{key}`"):
        VectorQuantizer(**({"codebook_size": 4, "latent_channels": 3} | options))


def test_latents_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"4 channels; allowed are 3, .*`autoencoder\.regularizer\.latent_channels`"):
        _quantizer()(torch.zeros(1, 4, 2, 2), None)
