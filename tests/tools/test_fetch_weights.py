"""`tools/fetch_weights.py`: only the published bytes get the published name."""

import hashlib
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import fetch_weights
import pytest

from ldm_train.nn.perceptual import cached_backbone

CONTENT = bytes(range(256)) * 10_000  # more than one chunk
FILE = f"tiny-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class QuietHandler(SimpleHTTPRequestHandler):
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The published folder: its path, its address, and the handler that counts."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / FILE).write_bytes(CONTENT)
    handler = type("Handler", (QuietHandler,), {"requests": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http.server_port}"
        monkeypatch.setitem(
            fetch_weights.WEIGHTS, "tiny", fetch_weights.Weights(FILE, f"{address}/{FILE}", 2.6, "a test: some.key")
        )
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder, address, handler
        http.shutdown()


def fetch(directory, *options):
    return fetch_weights.main(["tiny", "--directory", str(directory), *options])


def names(directory):
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_the_file_arrives_whole_under_its_name_alone(server, tmp_path, capsys):
    assert fetch(tmp_path / "new" / "weights") == 0
    assert (tmp_path / "new" / "weights" / FILE).read_bytes() == CONTENT
    assert names(tmp_path / "new" / "weights") == [FILE]
    assert "is ready for a test: some.key" in capsys.readouterr().err


def test_a_whole_file_is_not_fetched_again_and_a_damaged_one_is(server, tmp_path):
    _, _, handler = server
    for expected in (1, 1):
        assert fetch(tmp_path / "weights") == 0
        assert handler.requests == expected
    (tmp_path / "weights" / FILE).write_bytes(CONTENT[:-1])
    assert fetch(tmp_path / "weights") == 0
    assert handler.requests == 2
    assert (tmp_path / "weights" / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", [CONTENT[:-1], b"", b"<html>please log in</html>"], ids=["cut", "empty", "a page"])
def test_other_bytes_are_refused_and_leave_nothing(server, tmp_path, wrong, capsys):
    (server[0] / FILE).write_bytes(wrong)
    assert fetch(tmp_path / "weights") == 2
    assert names(tmp_path / "weights") == []
    assert "is not the published file" in capsys.readouterr().err


def test_what_was_there_outlasts_a_failure(server, tmp_path):
    (tmp_path / FILE).write_bytes(b"old")
    (server[0] / FILE).unlink()
    assert fetch(tmp_path) == 2
    assert (tmp_path / FILE).read_bytes() == b"old"


def test_a_mirror_is_asked_instead(server, tmp_path):
    folder, _, handler = server
    assert fetch(tmp_path / "weights", "--mirror", folder.as_uri()) == 0
    assert (tmp_path / "weights" / FILE).read_bytes() == CONTENT
    assert handler.requests == 0


@pytest.mark.parametrize(
    ("mirror", "reason"),
    [("http://127.0.0.1:9", "refused"), ("nonsense", "unknown url type"), ("{address}/elsewhere", "answers 404")],
)
def test_an_address_that_does_not_answer_says_what_to_do(server, tmp_path, mirror, reason, capsys):
    assert fetch(tmp_path / "weights", "--mirror", mirror.format(address=server[1])) == 2
    message = capsys.readouterr().err
    for part in (reason, "--mirror", f"copy it to {tmp_path / 'weights' / FILE}"):
        assert part in message
    assert names(tmp_path / "weights") == []


def test_the_list_tells_what_is_there(server, tmp_path, capsys):
    (tmp_path / FILE).write_bytes(CONTENT)
    (tmp_path / fetch_weights.WEIGHTS["vgg16"].file).write_bytes(b"cut")
    assert fetch_weights.main(["--list", "--directory", str(tmp_path)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert "(2.6 MB, there)" in lines["tiny"]
    assert "MB, damaged)" in lines["vgg16"]
    assert "MB, not there)" in lines["inception"]


def test_a_file_is_no_directory(server, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert fetch(tmp_path / "file") == 2
    assert f"{tmp_path / 'file'} is a file; allowed is a folder, there or not; change --directory" in " ".join(
        capsys.readouterr().err.split()
    )
    assert server[2].requests == 0


@pytest.mark.parametrize(("arguments", "said"), [([], "give one, or --list"), (["resnet"], "allowed are vgg16")])
def test_names_are_needed_and_known(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        fetch_weights.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_by_default_a_file_lands_where_lpips_looks():
    weights = fetch_weights.WEIGHTS["vgg16"]
    assert fetch_weights.parse(["vgg16"]).directory / weights.file == cached_backbone()


def test_a_file_published_under_another_name_gets_the_one_that_says_its_digest(server, tmp_path, monkeypatch):
    folder, address, _ = server
    (folder / FILE).rename(folder / "model.bin")
    renamed = replace(fetch_weights.WEIGHTS["tiny"], address=f"{address}/model.bin")
    monkeypatch.setitem(fetch_weights.WEIGHTS, "tiny", renamed)
    assert fetch(tmp_path / "weights") == 0
    assert (tmp_path / "weights" / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["vgg16", "inception", "clip_l14", "openclip_h14"])
def test_every_published_name_says_its_digest(name, tmp_path):
    file = fetch_weights.WEIGHTS[name].file
    (tmp_path / file).write_bytes(b"")
    assert not fetch_weights.is_published(tmp_path / file, file)


@pytest.fixture
def run_of(server, monkeypatch, tmp_path):
    """Overrides of a run whose text encoder and VGG16 are the published file of the test."""
    tiny = fetch_weights.WEIGHTS["tiny"]
    for name in ("clip_l14", "vgg16"):
        monkeypatch.setitem(fetch_weights.WEIGHTS, name, tiny)
    return [
        "experiment=ldm_512",
        "perceptual=lpips",
        f"paths.root={tmp_path}/runs",
        f"perceptual.backbone={tmp_path}/vgg/{FILE}",
        f"conditioner.encoder.weights={tmp_path}/mine/clip.safetensors",
    ]


def test_a_run_s_files_arrive_where_the_run_looks_for_them(run_of, tmp_path, capsys, server):
    assert fetch_weights.main([*run_of, "stage.autoencoder.checkpoint=untrained"]) == 0
    for path in (tmp_path / "vgg" / FILE, tmp_path / "mine/clip.safetensors"):
        assert path.read_bytes() == CONTENT
    digest = hashlib.sha256(CONTENT).hexdigest()
    listed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in listed] == ["perceptual.backbone", "conditioner.encoder.weights"]
    assert all(f"(2.6 MB, sha256 {digest}, there)" in line for line in listed)
    assert fetch_weights.main([*run_of, "stage.autoencoder.checkpoint=untrained"]) == 0
    assert server[2].requests == 2


def test_a_list_fetches_nothing_and_says_what_is_missing(run_of, tmp_path, capsys, server):
    (tmp_path / "vgg").mkdir()
    (tmp_path / "vgg" / FILE).write_bytes(b"cut")
    assert fetch_weights.main([*run_of, "--list"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["perceptual.backbone"].endswith("damaged, or another one)")
    digits = fetch_weights.digest_of(FILE)
    assert lines["conditioner.encoder.weights"].endswith(f"(2.6 MB, sha256 {digits}..., not there)")
    assert lines["stage.autoencoder.checkpoint"].endswith("(?, sha256 unknown, not there)")
    assert server[2].requests == 0
    assert names(tmp_path / "mine") == []


def test_what_nobody_publishes_is_named_after_all_else_was_fetched(run_of, tmp_path, capsys):
    assert fetch_weights.main(run_of) == 2
    assert (tmp_path / "mine/clip.safetensors").read_bytes() == CONTENT
    message = " ".join(capsys.readouterr().err.split())
    assert f"`stage.autoencoder.checkpoint`: {tmp_path}/runs/autoencoder_kl_f8" in message
    assert "make it first" in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["experiment=nothing"], "experiment/nothing"), (["experiment=demo", "unet.chanels=3"], "unet.chanels")],
)
def test_overrides_that_do_not_compose_are_refused(arguments, said, capsys):
    assert fetch_weights.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_names_and_overrides_do_not_mix(capsys):
    with pytest.raises(SystemExit):
        fetch_weights.main(["vgg16", "experiment=demo"])
    assert "give one kind" in capsys.readouterr().err
