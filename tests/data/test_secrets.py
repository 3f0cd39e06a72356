"""Signatures, passwords and options of a store are used, and are nowhere to be found afterwards."""

import logging
import warnings

import pytest

from ldm_train.data import ImageTextDataModule, RemoteFiles, ShardReader, ShardReadError, build_index
from ldm_train.data.index_store import relative_names
from ldm_train.data.locations import expand_shards, holds_secret, lasting, secrets_of, shown
from tests.data.conftest import sample, write_tar
from tests.data.faulty_server import serving

SIGNED = {
    "aws": "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2Fx&X-Amz-Date=20260101T000000Z&X-Amz-Expires=600"
    "&X-Amz-SignedHeaders=host&X-Amz-Signature={}",
    "aws, version 2": "AWSAccessKeyId=AKIA&Signature={}&Expires=1767225600",
    "cloudfront": "Policy=abc&Signature={}&Key-Pair-Id=K1",
    "google": "X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Date=2026&X-Goog-Signature={}",
    "google, version 2": "GoogleAccessId=me&Expires=1767225600&Signature={}",
    "azure": "sv=2024-01-01&st=2026&se=2027&sr=b&sp=r&sig={}",
    "a token": "token={}",
    "a token of access": "access_token={}",
}


@pytest.mark.parametrize("query", SIGNED.values(), ids=SIGNED)
def test_a_new_signature_is_the_same_file_and_another_file_is_another(query):
    one, again = (f"https://me:pw@host/a.tar?{query.format(secret)}" for secret in ("SECRET1/+", "SECRET2%3D"))
    assert lasting(one) == lasting(again) == "https://host/a.tar"
    assert lasting(one.replace("a.tar", "b.tar")) != lasting(one)
    versions = {lasting(f"{url}&versionId={version}") for url in (one, again) for version in (1, 2)}
    assert len(versions) == 2
    assert not any("SECRET" in name or "versionId" in name for name in versions)


def test_what_signs_nothing_tells_files_apart_without_being_said():
    urls = [
        "https://h/get",
        "https://h/get?id=17",
        "https://h/get?id=18",
        "https://h/get?st=1",
        "https://h/get?expires=1",
    ]
    urls += ["hf://a@main/x.tar", "hf://b@main/x.tar", "hf://main/x.tar"]
    assert len({lasting(url) for url in urls}) == len(urls)
    assert lasting("/a b/c?token=1.tar") == "/a b/c?token=1.tar"  # a path has no query
    with pytest.raises(ValueError, match=r"https://h/a.tar is named 2 times"):
        expand_shards(["https://h/a.tar?token=1", "https://h/a.tar?token=2"])


def test_names_of_shards_hold_no_secrets():
    assert relative_names(["https://me:pw@a/0.tar?sig=S", "https://me:pw@b/0.tar?sig=S"]) == ("a/0.tar", "b/0.tar")
    names = relative_names(["https://h/get?key=SECRET1", "https://h/get?key=SECRET2"])
    assert len({*names}) == 2
    assert "SECRET" not in "".join(names)


def test_texts_lose_passwords_of_any_letters_and_queries():
    assert shown("at https://me:p@ss@host/a and s3://b/c?d=e.") == "at https://host/a and s3://b/c?..."
    assert shown("mail me@host, see https://host/a@b") == "mail me@host, see https://host/a@b"
    assert set(secrets_of("https://me:password@h/a?x=1&token=abcdefg")) == {"me:password", "password", "abcdefg"} | {
        "x=1&token=abcdefg"
    }


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9/a b.tar?sig=SECRET", "http://127.0.0.1:9/a b.tar?..."),
        ("https://h/a.tar#token=SECRET", "https://h/a.tar#..."),
        ("https://h/a.tar;jsessionid=SECRET", "https://h/a.tar;..."),
        ("s3://KEY:SEC/RET@bucket/a.tar", "s3://bucket/a.tar"),
        ("https://SECRET@h/a.tar", "https://h/a.tar"),
        *((f"https://h/a.tar?{name}=SECRET", "https://h/a.tar?...") for name in ("key", "code", "jwt", "api_key")),
    ],
)
def test_wherever_a_secret_stands_it_is_left_out_and_warned_of(url, said):
    assert (shown(url), holds_secret(url)) == (said, True)
    assert shown(f"error: {url}!").removesuffix("!") == f"error: {said}"
    assert holds_secret(f"['s3://b/0.tar', '{url}']")
    assert "SECRET" not in shown(repr([url, url])).replace("SEC/RET", "SECRET")
    assert "SECRET" not in lasting(url)


@pytest.mark.parametrize("url", ["https://h:80/a@b c.tar", "http://[::1]:80/a@b", "hf://a@main/x.tar", "s3://b/a;b#1"])
def test_what_is_no_secret_is_not_taken_for_one(url):
    assert not holds_secret(url)
    assert shown(url) == url.replace("a@main", "main")


def test_one_location_says_nothing_behind_its_path_though_there_are_blanks():
    assert shown("https://m e:p w@h/a b.tar?sig=A B C") == "https://h/a b.tar?..."
    assert shown("['s3://b/0.tar', 'https://h/a b.tar?sig=A B C'] x?") == "['s3://b/0.tar', 'https://h/a b.tar?...'] x?"
    assert lasting("https://h/a.tar#token=SECRET") == lasting("https://h/a.tar;jsessionid=S?sig=T") == "https://h/a.tar"
    assert lasting("s3://b/a;b=1#c=2.tar") == "s3://b/a;b=1#c=2.tar"  # a key of a store


def _run(tmp_path, url, signature):
    """One epoch of a run on signed URLs; its training index."""
    signed = (
        url.replace("://", "://user:PASSWORD@") + "/{00000..00002}.tar?X-Amz-Expires=9&X-Amz-Signature=" + signature
    )
    module = ImageTextDataModule(
        [signed],
        8,
        2,
        seed=3,
        quarantine_dir=str(tmp_path / "run"),
        index_dir=str(tmp_path / "index"),
        cache_dir=str(tmp_path / "cache"),
        storage_options={"http": {"headers": {"X-Key": "OPTION_SECRET"}}},
    )
    module.setup("fit")
    keys = [key for batch in module.train_dataloader() for key in batch["key"]]
    return module, keys


def test_a_run_leaves_no_secret_and_a_new_signature_finds_its_index_and_its_copies(write_shards, tmp_path, caplog):
    pytest.importorskip("aiohttp")
    write_shards(3, 4, folder="served")
    write_tar(tmp_path / "served" / "00002.tar", [*sample(7)[:2], *sample(8)])  # has damage to be named
    write_shards(1, 1, 1, folder="other")
    said, runs = [], []
    with serving(tmp_path / "served") as server, caplog.at_level(logging.DEBUG, "ldm_train"):
        for signature in ("SIGNATURE1/a/b", "SIGNATURE2"):
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                runs.append(_run(tmp_path, server.url, signature))
            said += [str(warning.message) for warning in heard]
    (first, keys), (second, same_keys) = runs
    assert keys == same_keys
    assert first.train_index.fingerprint == second.train_index.fingerprint
    assert first.train_index.columns.folder == second.train_index.columns.folder  # one index
    assert all(count == 1 for (method, name), count in server.requests.items() if method == "GET" and ".tar" in name)
    assert second.shard_cache.counts.misses == 0
    files = [path for folder in ("run", "index", "cache") for path in (tmp_path / folder).rglob("*")]
    assert len(files) > 10
    assert any("damage" in path.name for path in files)
    written = b"".join(path.read_bytes() for path in files if path.is_file()) + "".join(map(str, files)).encode()
    for secret in ("PASSWORD", "SIGNATURE", "OPTION_SECRET", "X-Amz"):
        assert secret.encode() not in written
        assert secret not in caplog.text + "".join(said) + str(first.train_index.names)


@pytest.mark.parametrize("status", [403, 503])
def test_an_error_names_no_secret(tmp_path, status):
    pytest.importorskip("aiohttp")
    with serving(tmp_path) as server:
        url = server.url.replace("://", "://user:PASSWORD@") + "/0.tar?X-Amz-Signature=SIGNATURE"
        remote = RemoteFiles({"http": {"headers": {"X-Keys": "SECRET_OPTION"}}}, attempts=2, delay=0.01)
        for action in (lambda: remote.download(url, str(tmp_path / "x"), 1), lambda: remote.identity(url)):
            server.faults = [status] * 4
            with pytest.raises(ShardReadError) as failure:
                action()
            assert not {"PASSWORD", "SIGNATURE", "SECRET_OPTION"} & set(str(failure.value).replace("=", " ").split())
            assert "SIGNATURE" not in str(failure.value)
            assert "PASSWORD" not in str(failure.value)


def test_an_error_of_a_server_that_repeats_what_it_was_asked_names_no_secret(monkeypatch):
    remote = RemoteFiles({"s3": {"secret": "SECRET_OPTION", "keys": ["LISTED_SECRET", 12345678901]}}, attempts=1)

    def refused():
        raise OSError(
            22, "cannot sign GET /a.tar?X-Amz-Signature=SIGNATURE for SECRET_OPTION, LISTED_SECRET, 12345678901"
        )

    with pytest.raises(ShardReadError) as failure:
        remote._tried("https://host/a.tar?X-Amz-Signature=SIGNATURE", refused)
    assert not any(
        secret in str(failure.value) for secret in ("SIGNATURE", "SECRET_OPTION", "LISTED_SECRET", "1234567")
    )


def test_a_shard_that_fails_in_training_is_named_without_its_signature(tmp_path):
    class Failing:
        def open(self, location):
            raise OSError(5, "Input/output error")

    reader = ShardReader(("https://me:PASSWORD@h/a.tar?token=SECRET",), Failing(), attempts=1)
    with pytest.raises(ShardReadError, match=r"^https://h/a.tar\?\.\.\. could not be read") as failure:
        reader.read(0, 0, 1)
    assert "SECRET" not in str(failure.value)


def test_a_shard_that_this_user_may_not_read_is_said_in_three_parts(write_shards, monkeypatch):
    paths = expand_shards(write_shards(2))

    class Forbidden:
        def identity(self, location):
            raise PermissionError(13, "Permission denied", location)

    with pytest.raises(ShardReadError, match=r"00000.tar could not be read: Permission denied. .*must.*`data.shards`"):
        build_index(paths, storage=Forbidden())
