"""Data that are not simply shards on a disk: behind URLs, and as cached latents."""

import shutil
from pathlib import Path

import pytest

from ldm_train.dry_run.checks import checks
from tests.conftest import composed
from tests.data.faulty_server import serving

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "ldm_train/assets/noto_emoji"


def found(*overrides, root):
    return {check.name: check for check in checks(composed(*overrides, root=root))}


def test_of_shards_behind_urls_all_are_asked_for_and_one_is_fetched(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    for number in range(3):
        shutil.copy(EMOJI / f"0000{number}.tar", tmp_path / "served")
    own = [
        "experiment=demo_autoencoder",
        "data=webdataset",
        f"data.cache_dir={tmp_path}/cache",
        "data.val_fraction=0.1",
    ]
    with serving(tmp_path / "served") as server:
        shards = f"{server.url}/{{00000..00002}}.tar"
        checked = found(*own, f"data.shards='{shards}'", root=tmp_path / "runs")
        assert {check.state for check in checked.values()} == {"ok", "not checked"}
        fetched = {name for (method, name), _ in server.requests.items() if method == "GET" and name.endswith(".tar")}
        assert fetched == {"00000.tar"}
        assert "3 of 3 shards behind URLs answer" in checked["shards"].figure
        missing = found(*own, f"data.shards='{server.url}/{{00000..00003}}.tar'", root=tmp_path / "runs")
        assert missing["data"].state == "failed"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_cached_latents_go_with_the_encoder_that_made_them(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import cache_latents

    encoder = tiny_runs / "demo_autoencoder/default/checkpoints/last.ckpt"
    given = [
        "--checkpoint",
        encoder,
        "--data",
        EMOJI / "00000.tar",
        "--image-size",
        32,
        "--output",
        tmp_path / "latents",
    ]
    assert cache_latents.main([*map(str, given), "--workers", "0", "--device", "cpu"]) == 0
    own = [
        "experiment=demo", "data=latents", f"data.shards={tmp_path}/latents/*.tar", "callbacks.samples=null",
        "stage.moments._target_=ldm_train.stages.CachedMoments", f"stage.autoencoder.checkpoint={encoder}",
    ]  # fmt: skip
    checked = found(*own, root=tmp_path / "runs")
    assert {name for name, check in checked.items() if check.state == "failed"} == set()
    assert "moments (64, 12, 8, 8)" in checked["a batch"].figure
