import pytest
import torch
import torchvision
from torchmetrics.functional.image.lpips import _LPIPS

from ldm_train.nn import LPIPS
from ldm_train.nn.perceptual import VGG16_FILE, cached_backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Random weights in the layout of the published file, of which they hold the convolutions only."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None)
    state = {}
    for name, tensor in network.features.state_dict().items():
        # Activations keep their size through the layers; biases leave some of them dead at whole positions.
        fan_in = tensor[0].numel()
        state[f"features.{name}"] = torch.randn(tensor.shape) * ((2 / fan_in) ** 0.5 if tensor.ndim == 4 else 0.1)
    path = tmp_path_factory.mktemp("weights") / VGG16_FILE
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as the published file is
    return path


@pytest.fixture(scope="module")
def lpips(backbone):
    return LPIPS(backbone=str(backbone))


def _images(count, seed, size=(32, 40)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equals_torchmetrics_with_the_same_backbone(lpips, backbone):
    other = _LPIPS(pretrained=True, net="vgg", pnet_rand=True).eval()
    layers = torch.nn.Sequential(*(layer for slice_ in other.net.children() for layer in slice_))
    state = torch.load(backbone, weights_only=True)
    layers.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    x, y = _images(3, seed=1), _images(3, seed=2)
    distance = lpips(x, y)
    assert distance.shape == (3,)
    assert float(distance.min()) > 0
    torch.testing.assert_close(distance, other(x, y).flatten(), rtol=1e-5, atol=1e-7)


def test_it_is_symmetric_and_zero_between_equal_images(lpips):
    x, y = _images(2, seed=1), _images(2, seed=2)
    torch.testing.assert_close(lpips(x, y), lpips(y, x))
    assert lpips(x, x).tolist() == [0.0, 0.0]


def test_gradients_reach_both_images_and_no_weight(lpips):
    x, y = _images(2, seed=1).requires_grad_(), _images(2, seed=2).requires_grad_()
    lpips(x, y).sum().backward()
    for images in (x, y):
        assert float(images.grad.flatten(1).norm(dim=1).min()) > 0
    # The distance is symmetric, so the gradient of its second argument is that of the first with the two exchanged.
    first, second = y.detach().clone().requires_grad_(), x.detach()
    lpips(first, second).sum().backward()
    torch.testing.assert_close(y.grad, first.grad, rtol=1e-4, atol=1e-7)
    assert not any(p.requires_grad for p in lpips.parameters())


def test_distance_and_gradient_are_zero_where_all_features_are(lpips, backbone, tmp_path):
    state = torch.load(backbone, weights_only=True)
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, tmp_path / VGG16_FILE)
    dead = LPIPS(backbone=str(tmp_path / VGG16_FILE))
    x = _images(1, seed=1).requires_grad_()
    distance = dead(x, _images(1, seed=2)).sum()
    distance.backward()
    assert distance.item() == 0.0
    assert not x.grad.any()  # NaN counts as something


def test_a_descent_on_it_brings_an_image_closer(lpips):
    x, y = _images(1, seed=1, size=(16, 16)).requires_grad_(), _images(1, seed=2, size=(16, 16))
    before = lpips(x, y).sum()
    before.backward()
    with torch.no_grad():
        moved = x - 0.05 * x.grad / x.grad.abs().max()
        assert float(lpips(moved, y)) < before.item()


def test_it_stays_in_evaluation_mode(lpips):
    lpips.train()
    assert not any(module.training for module in lpips.modules())


def test_norms_and_sums_are_in_float32_under_autocast(lpips):
    x, y = _images(1, seed=1), _images(1, seed=2)
    expected = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(x, y)
        features = [(images - lpips.mean) / lpips.std for images in (x, y)]
        for index, stage in enumerate(lpips.stages):
            features = [stage(h) for h in features]
            assert features[0].dtype == torch.bfloat16
            unit_x, unit_y = (h.double() / (h.double().square().sum(1, keepdim=True) + 1e-8).sqrt() for h in features)
            head = lpips.get_buffer(f"head_{index}").double()
            expected += ((unit_x - unit_y).square() * head).sum(1).mean()
    assert distance.item() == pytest.approx(float(expected), rel=1e-5)


def test_without_a_path_the_file_of_torch_s_cache_is_read(lpips, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert cached_backbone() == tmp_path / "checkpoints" / VGG16_FILE
    with pytest.raises(FileNotFoundError) as error:
        LPIPS()
    for part in (str(cached_backbone()), "python tools/fetch_weights.py vgg16", "change `perceptual.backbone`"):
        assert part in str(error.value)
    cached_backbone().parent.mkdir()
    cached_backbone().symlink_to(backbone)
    x, y = _images(1, seed=1), _images(1, seed=2)
    assert torch.equal(LPIPS()(x, y), lpips(x, y))


def test_a_weight_of_zero_needs_no_file(tmp_path):
    off = LPIPS(weight=0.0, backbone=str(tmp_path / "missing"))
    assert list(off.parameters()) == []
    with pytest.raises(RuntimeError, match=r"change `perceptual\.weight`"):
        off(_images(1, seed=1), _images(1, seed=2))


@pytest.mark.parametrize("damage", ["truncated", "other network", "other shapes", "pickle"])
def test_a_file_that_cannot_be_used_is_refused(damage, backbone, tmp_path):
    path = tmp_path / VGG16_FILE
    state = torch.load(backbone, weights_only=True)
    if damage == "truncated":
        path.write_bytes(backbone.read_bytes()[:100_000])
    elif damage == "other network":
        torch.save({"conv1.weight": torch.zeros(3)}, path)
    elif damage == "other shapes":
        torch.save(state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    else:
        torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(
        ValueError, match=rf"{VGG16_FILE}.*; allowed is {VGG16_FILE}.*change `perceptual\.backbone`"
    ) as e:
        LPIPS(backbone=str(path))
    assert "\n" not in str(e.value)  # torch's own advice, to load without care, is left out


def test_images_too_small_are_refused(lpips):
    with pytest.raises(ValueError, match=r"15 x 32, too small .* allowed are 16 x 16 .* change `image_size`"):
        lpips(_images(1, 1, size=(15, 32)), _images(1, 2, size=(15, 32)))


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"weight is -1\.0; allowed are .* change `perceptual\.weight`"):
        LPIPS(weight=-1.0)
