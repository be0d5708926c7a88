"""Checkpoints: what is saved comes back, what is damaged is refused, nothing in one is run."""

from __future__ import annotations

import builtins
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from denoise_core import checkpoints
from denoise_core.checkpoints import absolute_name, load_checkpoint, save_checkpoint
from denoise_core.errors import AccessDenied, CheckpointError, ObjectNotFound, UsageError
from denoise_core.models import build_model
from denoise_core.storage import StorageOptions, cache_folder, storage_for

ARGUMENTS = {"widths": [4, 6], "blocks": [1, 1], "channels": 3}
CARD = {
    "name": "tiny",
    "architecture": "unet",
    "arguments": ARGUMENTS,
    "total_stride": 2,
    "default_halo": 4,
    "exact_halo": 12,
}


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    shapes = [w.shape for w in build_model("unet", **ARGUMENTS).get_weights()]
    return [rng.normal(0, 0.1, shape).astype(np.float32) for shape in shapes]


@pytest.fixture
def folder(tmp_path, weights):
    save_checkpoint(tmp_path, weights, CARD)
    return tmp_path


def edit(folder, **changes):
    """Change keys of the card; None removes one."""
    path = folder / "model.json"
    card = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in card.items() if value is not None}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip(tmp_path, weights, dtype):
    saved = save_checkpoint(tmp_path, weights, CARD, dtype=dtype)
    loaded = load_checkpoint(str(tmp_path))
    assert loaded == saved
    assert loaded.name == "tiny"
    for got, expected in zip(loaded.weights(), weights, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected.astype(dtype).astype(np.float32))
    for got, expected in zip(loaded.build().get_weights(), loaded.weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_float16_halves_the_file(tmp_path, weights):
    sizes = [
        save_checkpoint(tmp_path, weights, CARD, name=dtype, dtype=dtype)
        .weights_path.stat()
        .st_size
        for dtype in ("float32", "float16")
    ]
    assert sizes[1] < 0.75 * sizes[0]


def test_saving_replaces_and_leaves_nothing_else(folder, weights):
    first = load_checkpoint(str(folder)).hash
    save_checkpoint(folder, [w + 1 for w in weights], CARD)
    assert load_checkpoint(str(folder)).hash != first
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["", "/model.json", "/model.safetensors", "/model"])
def test_a_checkpoint_is_found_by_folder_card_weights_or_stem(folder, name):
    assert load_checkpoint(f"{folder}{name}").weights_path == folder / "model.safetensors"


def test_a_dot_in_a_name_is_no_ending(tmp_path, weights):
    for name in ("v1", "v1.2"):
        save_checkpoint(tmp_path, weights, {**CARD, "name": name}, name=name)
    assert load_checkpoint(str(tmp_path / "v1.2")).name == "v1.2"


def test_a_shipped_name_goes_first_and_an_unknown_one_gets_the_nearest(
    folder, tmp_path_factory, monkeypatch
):
    shipped = tmp_path_factory.mktemp("weights")
    for ending in ("json", "safetensors"):
        shutil.copy(folder / f"model.{ending}", shipped / f"unet-s.{ending}")
    monkeypatch.setattr(checkpoints, "SHIPPED", shipped)
    assert checkpoints.shipped_names() == ["unet-s"]
    assert load_checkpoint("unet-s").weights_path == shipped / "unet-s.safetensors"
    with pytest.raises(UsageError, match=r"'unet_s'.*shipped model \(unet-s\).*mean 'unet-s'"):
        load_checkpoint("unet_s")


def test_a_missing_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "none")
    with pytest.raises(UsageError, match=r"--model 'no-such': neither a shipped model \(none\)"):
        load_checkpoint("no-such")
    with pytest.raises(UsageError, match=r"^--init 'no-such': neither"):
        load_checkpoint("no-such", flag="--init")
    with pytest.raises(UsageError, match=r"model\.json"):
        load_checkpoint(str(tmp_path))


def test_weights_that_are_not_the_cards_are_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_checkpoint(str(folder)).weights()


def test_missing_weights_are_an_error_of_the_checkpoint(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(str(folder)).weights()


@pytest.mark.parametrize("key", checkpoints.REQUIRED)
def test_a_card_without_a_key_is_refused_by_the_key(folder, key):
    edit(folder, **{key: None})
    with pytest.raises(CheckpointError, match=f"the card lacks {key}"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["", "{", "7", "[]", "null", "\xff", "[" * 100_000])
def test_what_is_no_card_is_refused(folder, text):
    (folder / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="not a model card"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"total_stride": 0},
        {"total_stride": "2"},
        {"default_halo": -4},
        {"exact_halo": 1.5},
        {"arguments": [4, 6]},
    ],
    ids=str,
)
def test_a_card_with_impossible_values_is_refused(folder, changes):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match="must be whole numbers"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data_range": "abc"}, "data_range is abc; expected two numbers"),
        ({"data_range": [1]}, "expected two numbers"),
        ({"data_range": ["a", "b"]}, "expected two numbers"),
        ({"data_range": [0, None]}, "expected two numbers"),
        ({"data_range": [0, 0]}, "expected two numbers, the lower one first"),
        ({"data_range": [0, float("nan")]}, "expected two numbers"),
        ({"input_size": 5}, r"input_size is 5; expected \[height, width\]"),
        ({"input_size": [28]}, r"expected \[height, width\]"),
        ({"arguments": {**ARGUMENTS, "channels": "one"}}, "channels is one; expected a whole"),
        ({"break_even_sigma": "x"}, "expected a number from 0"),
        ({"name": 5}, "name is 5; expected a text"),
        ({"total_stride": 1}, "total_stride is 1; expected a multiple of 2"),
        ({"arguments": {**ARGUMENTS, "widths": 4}}, "does not fit its card"),
        ({"arguments": {**ARGUMENTS, "widths": [4, float("nan")]}}, "does not fit its card"),
    ],
    ids=str,
)
def test_a_card_with_values_of_other_kinds_is_refused(folder, changes, sentence):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "os.system"},
        {"arguments": {**ARGUMENTS, "widths": [4, 8]}},
        {"arguments": {**ARGUMENTS, "widths": [4]}},
        {"arguments": {**ARGUMENTS, "unknown": 1}},
        {"arguments": {**ARGUMENTS, "precision": "float32"}},
        {"arguments": {**ARGUMENTS, "widths": "4, 6"}},
    ],
    ids=str,
)
def test_weights_of_another_architecture_are_refused(folder, changes):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match="does not fit its card"):
        load_checkpoint(str(folder)).build()


def test_loading_runs_no_code_of_a_checkpoint(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a checkpoint was unpickled or evaluated")

    for module, name in (("pickle", "loads"), ("pickle", "load"), ("pickle", "Unpickler")):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    edit(folder, note="__import__('os').system('touch hacked')")
    checkpoint = load_checkpoint(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "eval", refuse)
        assert len(checkpoint.weights()) > 0


def test_a_pickle_in_place_of_the_weights_is_refused(folder):
    import hashlib
    import pickle

    class Hack:
        def __reduce__(self):
            return (open, (str(folder / "hacked"), "w"))

    data = pickle.dumps(Hack())
    (folder / "model.safetensors").write_bytes(data)
    edit(folder, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(str(folder)).build()
    assert not (folder / "hacked").exists()


# --- On S3 ------------------------------------------------------------------------------------


@pytest.fixture
def best(s3_server, folder, tmp_path_factory, monkeypatch):
    """The URI of a checkpoint on S3; what is copied from there goes to a folder of the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    uri = f"{s3_server.make_bucket()}/runs/one/best"
    upload(uri, folder)
    return uri


def upload(uri, folder):
    for path in folder.iterdir():
        storage_for(uri).write(f"{uri}/{path.name}", path.read_bytes())


def cached():
    return sorted(path for path in cache_folder("models").rglob("*") if path.is_file())


@pytest.mark.parametrize("ending", ["", "/", "/model.json", "/model.safetensors"])
def test_a_checkpoint_on_s3_is_the_same_as_on_disk(best, folder, ending):
    here, there = load_checkpoint(str(folder)), load_checkpoint(f"{best}{ending}")
    assert (there.name, there.card) == (here.name, here.card)
    for got, expected in zip(there.build().get_weights(), here.weights(), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert absolute_name(f"{best}{ending}") == f"{best}{ending}"
    assert cached() == [there.weights_path.with_suffix(".json"), there.weights_path]


def test_a_checkpoint_is_looked_for_at_the_endpoint_of_the_settings(best, s3_server, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = StorageOptions(s3_endpoint=s3_server.endpoint)
    assert load_checkpoint(best, options=options).name == "tiny"


def test_what_is_missing_on_s3_is_named(best):
    with pytest.raises(UsageError, match=rf"^--model '{best}/x': neither a folder .* NoSuchKey"):
        load_checkpoint(f"{best}/x")
    with pytest.raises(UsageError, match=rf"^--init '{best}/x': neither"):
        load_checkpoint(f"{best}/x", flag="--init")
    with pytest.raises(UsageError, match=r"/none\.keras: there is no such object .*\)\.$"):
        load_checkpoint(f"{best}/none.keras")
    with pytest.raises(UsageError, match="there is no such bucket"):
        load_checkpoint("s3://no-such-bucket-here/best")
    storage_for(best).delete(f"{best}/model.safetensors")
    with pytest.raises(ObjectNotFound, match=rf"^{best}/model\.safetensors: there is no such obj"):
        load_checkpoint(best)


def test_wrong_keys_are_an_error_of_the_storage(best, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDenied, match=rf"^{best}/model\.json: access denied"):
        load_checkpoint(best)


def test_a_damaged_checkpoint_on_s3_is_named_by_its_uri_and_not_kept(best):
    storage = storage_for(best)
    storage.write(f"{best}/model.safetensors", b"damaged")
    with pytest.raises(CheckpointError, match=rf"^{best}/model\.safetensors: .* SHA-256"):
        load_checkpoint(best)
    assert [path.name for path in cached()] == ["model.json"]
    storage.write(f"{best}/model.json", b"{}")
    with pytest.raises(CheckpointError, match=rf"^{best}/model\.json: the card lacks arch"):
        load_checkpoint(best)


def test_a_damaged_copy_is_fetched_again(best):
    first = load_checkpoint(best)
    first.weights_path.write_bytes(b"damaged")
    assert len(load_checkpoint(best).weights()) == len(first.weights())


def test_a_checkpoint_replaced_on_s3_is_another_and_refused_to_who_wants_the_first(
    best, folder, weights
):
    first = load_checkpoint(best)
    assert load_checkpoint(best, sha256=first.hash) == first
    save_checkpoint(folder, [w + 1 for w in weights], CARD)
    upload(best, folder)
    with pytest.raises(CheckpointError, match=rf"^--model {best}: its weights are not those that"):
        load_checkpoint(best, sha256=first.hash)
    with pytest.raises(CheckpointError, match=rf"^--init {best}: its weights"):
        load_checkpoint(best, sha256=first.hash, flag="--init")
    np.testing.assert_array_equal(load_checkpoint(best).weights()[0], weights[0] + 1)
    np.testing.assert_array_equal(first.weights()[0], weights[0])


def test_processes_may_fetch_a_checkpoint_at_once(best):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(load_checkpoint, [best] * 8))
    assert len({each.weights_path for each in found}) == 1
    assert [path.name for path in cached()] == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["..json", "%2e%2e%2fmodel.json", "..\\model.json"])
def test_what_is_copied_from_s3_stays_in_its_folder(best, folder, name):
    for ending in ("json", "safetensors"):
        data = (folder / f"model.{ending}").read_bytes()
        storage_for(best).write(f"{best}/{name.removesuffix('json')}{ending}", data)
    checkpoint = load_checkpoint(f"{best}/{name}")
    assert checkpoint.weights_path.parent.parent == cache_folder("models")
    assert len(checkpoint.weights_path.parent.name) == 64
    assert len(cached()) == 2


def test_a_keras_file_on_s3_is_the_same_as_on_disk(best, tmp_path):
    import keras

    noisy = keras.Input((None, None, 1))
    path = tmp_path / "mine.keras"
    keras.Model(noisy, keras.layers.Conv2D(1, 3, padding="same")(noisy)).save(path)
    uri = f"{best}/mine.keras"
    storage_for(best).write(uri, path.read_bytes())
    here = load_checkpoint(str(path), measure=False)
    there = load_checkpoint(uri, measure=False, sha256=here.hash)
    assert (there.name, there.card) == (here.name, here.card)
    np.testing.assert_array_equal(there.weights()[0], here.weights()[0])
    storage_for(best).write(uri, b"no model")
    with pytest.raises(CheckpointError, match=rf"^{uri}: "):
        load_checkpoint(uri)
