"""A run whose shards lie behind a secret: used, resumed with another one, and written nowhere."""

import pytest

from ldm_train.train import train
from tests.conftest import TINY_RUNS, composed
from tests.data.conftest import sample, write_tar
from tests.data.faulty_server import serving


def _overrides(url, folder, steps):
    shards = url.replace("://", "://${oc.env:WHO}@") + "/{0..1}.tar?X-Amz-Signature=${oc.env:SIGNATURE}"
    return [
        "experiment=demo_autoencoder",
        "debug=tiny",
        "data=webdataset",
        f"data.shards='{shards}'",
        "data.storage_options={http: {headers: {X-Key: '${oc.env:HEADER}'}}}",
        "data.num_workers=0",
        "data.val_fraction=0.2",
        f"data.cache_dir={folder}/cache",
        f"data.index_dir={folder}/index",
        f"trainer.max_steps={steps}",
        *TINY_RUNS["demo_autoencoder"],
    ]


@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_on_signed_urls_resumes_with_another_signature_and_keeps_none(forked_runs, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    for shard in range(2):
        members = [member for number in range(40 * shard, 40 * shard + 40) for member in sample(number)]
        write_tar(tmp_path / "served" / f"{shard}.tar", members)
    secrets = {"WHO": "me:PASSWORD_X", "SIGNATURE": "SIGNATURE_X1", "HEADER": "HEADER_X"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with serving(tmp_path / "served") as server:
        forked_runs.start(*_overrides(server.url, tmp_path, 2), root=tmp_path / "runs", **secrets)
        codes, _ = forked_runs.wait()
        said = forked_runs.said()
        assert codes == [0], said[-3000:]
        assert "in clear" not in said
        monkeypatch.setenv("SIGNATURE", "SIGNATURE_X2")
        train(composed(*_overrides(server.url, tmp_path, 4), root=tmp_path / "runs"))
    assert all(count == 1 for (method, name), count in server.requests.items() if method == "GET" and ".tar" in name)
    files = [path for folder in ("runs", "index", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"last.ckpt", "config.yaml", "overrides.yaml", "metrics.csv", "table.json"} <= names
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        data = path.read_bytes()
        for secret in (b"PASSWORD_X", b"SIGNATURE_X", b"HEADER_X"):
            assert secret not in data, path
    assert "_X" not in said.replace("X-Amz", "")
