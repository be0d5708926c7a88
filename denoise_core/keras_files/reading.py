"""Opens a user's Keras file without TensorFlow, and refuses whatever could run code.

Nothing in a file is ever run. Its archive may hold the three members that Keras writes and no
others, its HDF5 no links to elsewhere, its configuration only the layers named here, all of them
Keras' own. Of that, `clean_copy` writes what is loaded: without optimizer, loss and metrics, and
with float32 as the type of every layer.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoise_core.errors import CheckpointError

ENDINGS = (".keras", ".h5", ".hdf5")
MEMBERS = {"config.json", "metadata.json", "model.weights.h5"}
CONFIG_BYTES = 64 << 20
MODEL_BYTES = 4 << 30
# A total stride of more pixels is not looked for.
MOST_STRIDE = 256

LAYERS = """
    InputLayer Functional Model Sequential Conv2D Conv2DTranspose SeparableConv2D DepthwiseConv2D
    MaxPooling2D AveragePooling2D GlobalAveragePooling2D GlobalMaxPooling2D UpSampling2D
    ZeroPadding2D Cropping2D Resizing Rescaling Normalization Dense Flatten Reshape Permute
    RepeatVector Identity Activation ReLU LeakyReLU PReLU ELU Softmax BatchNormalization
    LayerNormalization GroupNormalization UnitNormalization RMSNormalization SpectralNormalization
    Dropout SpatialDropout2D GaussianNoise GaussianDropout AlphaDropout ActivityRegularization Add
    Subtract Multiply Average Maximum Minimum Concatenate Dot Attention AdditiveAttention
    MultiHeadAttention TimeDistributed RandomBrightness RandomContrast RandomFlip RandomRotation
    RandomTranslation RandomZoom
"""
# None that could come to a stride which `_strides` does not see, such as Resize.
OPERATIONS = """
    Add Subtract Multiply Divide TrueDivide Negative Absolute Square Sqrt Exp Log Clip Maximum
    Minimum Mean Sum Max Concatenate Reshape Transpose ExpandDims Squeeze GetItem Pad Cast Relu
    Relu6 LeakyRelu Sigmoid HardSigmoid Tanh Silu Gelu Elu Selu Softplus Softmax DepthToSpace
    SpaceToDepth Power Mod FloorDivide Reciprocal Rsqrt Log1p Log2 Log10 Expm1 Sin Cos Sign Round
    Floor Ceil HardTanh HardSilu Softsign Celu LogSigmoid LogSoftmax Where Greater GreaterEqual Less
    LessEqual Equal NotEqual Min Prod Std Var Flip Split Stack
"""
PARTS = """
    Zeros Ones Constant RandomNormal RandomUniform TruncatedNormal VarianceScaling GlorotNormal
    GlorotUniform HeNormal HeUniform LecunNormal LecunUniform Orthogonal OrthogonalInitializer
    IdentityInitializer L1 L2 L1L2 OrthogonalRegularizer MaxNorm MinMaxNorm NonNeg UnitNorm
    DTypePolicy Policy TensorShape __keras_tensor__ __tuple__ __slice__ __ellipsis__
"""
KNOWN = frozenset(f"{LAYERS} {OPERATIONS} {PARTS}".split())
DOWN = {
    "Conv2D",
    "SeparableConv2D",
    "DepthwiseConv2D",
    "MaxPooling2D",
    "AveragePooling2D",
    "SpaceToDepth",
}
# What Keras 2 wrote for some layers, without meaning there, and Keras 3 does not know.
GONE = {
    "Conv2DTranspose": {"groups"},
    "DepthwiseConv2D": {"groups"},
    "SeparableConv2D": {"groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"},
}
# Modules of Keras 2 that only a model itself names; Keras 3 has none of them.
ENGINES = ("tf_keras.", "keras.engine.", "keras.src.engine.")
FUNCTIONAL = "keras.src.models.functional"
ZIP, HDF5 = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"
FLOATS = {"float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16"}

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Description:
    """What a file says of its model.

    `input_size` is (h, w), or None for any size; `has_channel_axis` is False for inputs (N, h, w).
    `strides`, ascending, are the total strides that its layers can come to.
    """

    channels: int
    input_size: tuple[int, int] | None
    has_channel_axis: bool
    strides: tuple[int, ...]


def describe(path: Path) -> Description:
    """Check a file and read its input shape, without TensorFlow. Raises CheckpointError."""
    data, version = _opened(path)
    model = _config_of(path, data)
    try:
        found = _described(path, model)
        if version < 3:
            _check_meanings(path, model)
        return found
    except (TypeError, AttributeError, ValueError, LookupError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its configuration is damaged ({type(error).__name__}: {error}); save the "
            "model again by model.save(...)."
        ) from error


def _described(path: Path, model: Config) -> Description:
    _check(path, model)
    shape = _input_shape(path, model)
    channels = shape[-1] if len(shape) == 4 else 1
    sides = [side for side in shape[1:] if side is not None]
    whole = all(type(side) is int and side > 0 for side in sides)
    if len(shape) not in (3, 4) or channels is None or not whole:
        raise CheckpointError(
            f"{path}: its input is {tuple(shape)}; expected images, (None, height, width, channels)"
            " with a number of channels: begin the model with keras.Input((28, 28, 1)) or the like."
        )
    height, width = shape[1:3]
    if (height is None) != (width is None):
        raise CheckpointError(
            f"{path}: its input is {tuple(shape)}; expected height and width both given or both "
            "None."
        )
    size = None if height is None or width is None else (height, width)
    return Description(channels, size, len(shape) == 4, _strides(model))


def read_bytes(path: Path) -> bytes:
    """Return a model file's bytes. Raises CheckpointError."""
    try:
        if path.stat().st_size > MODEL_BYTES:
            raise CheckpointError(f"{path}: has more than {MODEL_BYTES >> 30} GiB.")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error


def _opened(path: Path) -> tuple[bytes | None, int]:
    """Return the configuration's bytes, if any, and the version of the Keras that wrote them.

    Raises CheckpointError for a file that is none of Keras.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    # By the first bytes and not by the ending: up to TensorFlow 2.11 a .keras was HDF5.
    if not head.startswith((ZIP, HDF5)):
        raise CheckpointError(
            f"{path}: is neither a zip archive nor an HDF5 file, as Keras writes .keras and .h5; "
            "save the model again by model.save(...)."
        )
    try:
        if head.startswith(ZIP):
            return _zipped_config(path), _major(_zipped_version(path))
        return _hdf5_config(path), _major(_hdf5_version(path))
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: is damaged ({error}).") from error


def _zipped_config(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        strange = [name for name in names if name not in MEMBERS]
        if strange or len(names) != len(set(names)):
            raise CheckpointError(
                f"{path}: holds {(strange or names)[0]!r}, which is no part of a model of Keras' "
                "own layers, and nothing of a file is unpacked or run but its layers and weights; "
                "save the model again by model.save('x.keras')."
            )
        _refuse_packing(path, archive)
        if archive.getinfo("config.json").file_size > CONFIG_BYTES:
            raise CheckpointError(f"{path}: its configuration is larger than 64 MiB.")
        if sum(archive.getinfo(name).file_size for name in names) > MODEL_BYTES:
            raise CheckpointError(f"{path}: unpacks to more than {MODEL_BYTES >> 30} GiB.")
        return archive.read("config.json")


def _refuse_packing(path: Path, archive: zipfile.ZipFile) -> None:
    """Of bzip2 and LZMA zipfile unpacks a whole block at once, however small the size told."""
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(
                f"{path}: packs {member.filename!r} by method {member.compress_type}; expected "
                "none or deflate, as Keras packs: save the model again by model.save('x.keras')."
            )


def _zipped_version(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, archive.open("metadata.json") as member:
        metadata = json.loads(member.read(1 << 16))
    return metadata.get("keras_version") if isinstance(metadata, dict) else None


def _hdf5_version(path: Path) -> Any:
    import h5py

    with h5py.File(path, "r") as file:
        return file.attrs.get("keras_version")


def _major(version: Any) -> int:
    """Return 3 for '3.15.1', and 0 where a file does not say its version."""
    text = version.decode() if isinstance(version, bytes) else str(version or 0)
    return int(text.split(".")[0])


def _hdf5_config(path: Path) -> bytes | None:
    import h5py

    with h5py.File(path, "r") as file:
        _check_hdf5(path, file)
        config = file.attrs.get("model_config")
        return config.encode() if isinstance(config, str) else config


def _check_hdf5(path: Path, file: Any) -> None:
    """Refuse HDF5 whose groups and arrays lie elsewhere than in the file itself."""
    import h5py

    waiting, seen = [file["/"]], set()
    while waiting:
        group = waiting.pop()
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise CheckpointError(
                    f"{path}: {name!r} is a link to data elsewhere; save the model again by "
                    "model.save(...)."
                )
            item = group[name]
            if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                raise CheckpointError(f"{path}: the array {name!r} lies in another file.")
            address = h5py.h5o.get_info(item.id).addr
            if isinstance(item, h5py.Group) and address not in seen:
                seen.add(address)
                waiting.append(item)


def _config_of(path: Path, data: bytes | None) -> Config:
    if data is None:
        raise CheckpointError(
            f"{path}: holds weights without the layers that they belong to; save the whole model "
            "by model.save('x.keras') in place of model.save_weights(...)."
        )
    try:
        model = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration is no JSON ({error}).") from error
    if not (isinstance(model, dict) and isinstance(model.get("config"), dict | list)):
        raise CheckpointError(f"{path}: its configuration is that of no Keras model.")
    return model


def _objects(node: Any) -> Iterator[Config]:
    """Yield every description of an object inside a configuration, outer ones first."""
    if isinstance(node, dict):
        if "class_name" in node:
            yield node
        for key, value in node.items():
            if key != "compile_config":
                yield from _objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from _objects(value)


def _check(path: Path, model: Config) -> None:
    """Raise CheckpointError unless every object is a known class of Keras itself."""
    for found in _objects(model):
        name, config = found["class_name"], found.get("config")
        module = found.get("module") or "keras"
        own = isinstance(module, str) and (module == "keras" or module.startswith("keras."))
        own = own or (name == "Functional" and str(module).startswith(ENGINES))
        registered = found.get("registered_name") in (None, name)
        if not (own and registered and name in KNOWN):
            label = config.get("name") if isinstance(config, dict) else None
            text = str(label or config)[:60]
            raise CheckpointError(_refusal(path, str(name), text, plain=own and registered))
        if isinstance(config, dict) and config.get("data_format") == "channels_first":
            raise CheckpointError(
                f"{path}: its layers are channels_first; expected (height, width, channels): build "
                "the model with data_format='channels_last' and save it again."
            )


def _check_meanings(path: Path, model: Config) -> None:
    """Raise CheckpointError for what a file of Keras 2 says and Keras 3 reads as something else."""
    for found in _objects(model):
        config = found.get("config")
        label = config.get("name") if isinstance(config, dict) else None
        label = found.get("name") or label or found["class_name"]
        if any(call.get("training") for call in _calls(found.get("inbound_nodes"))):
            raise CheckpointError(
                f"{path}: was saved by Keras 2, in which its layer {label!r} is called with "
                "training=True; Keras 3 would drop that and give other pixels: build the model "
                "without it, load its weights and save it again."
            )
        if isinstance(config, dict) and config.get("activation") == "hard_sigmoid":
            raise CheckpointError(
                f"{path}: was saved by Keras 2, in which hard_sigmoid of its layer {label!r} is "
                "0.2x+0.5; in Keras 3 it is x/6+0.5 and gives other pixels: train the model with "
                "another activation, such as sigmoid."
            )


def _calls(node: Any) -> Iterator[Config]:
    """Yield the named arguments of all calls in `inbound_nodes` of Keras 2."""
    if isinstance(node, dict):
        yield node
    elif isinstance(node, list):
        for value in node:
            yield from _calls(value)


def _refusal(path: Path, name: str, label: str, *, plain: bool) -> str:
    """Return the sentence about an object; `plain` where it says to be a class of Keras itself."""
    advice = (
        "by Keras' own layers (Add for +, Rescaling for *, Activation, ...) and save the model "
        "again."
    )
    code = {
        "Lambda": f"the Lambda layer {label!r}",
        "__lambda__": "a Python lambda",
        "function": f"the function {label!r}",
        "TFOpLambda": f"the TensorFlow operation {label!r}",
        "SlicingOpLambda": f"the TensorFlow operation {label!r}",
    }
    if plain and name not in code:
        return f"{path}: holds {name!r}, which is not supported here; replace it {advice}"
    what = code.get(name, f"{name!r}, which is none of Keras' own layers for images")
    return (
        f"{path}: holds {what}. To load it would need code, and no code of a model file is run; "
        f"replace it {advice}"
    )


def _input_shape(path: Path, model: Config) -> list[int | None]:
    """Return the one input's shape with its batch axis."""
    config = model["config"]
    layers = config["layers"] if isinstance(config, dict) else config
    if model["class_name"] != "Sequential":
        for kind in ("input", "output"):
            names = _ends(config.get(f"{kind}_layers"))
            if len(names) != 1:
                raise CheckpointError(
                    f"{path}: has {len(names)} {kind}s; expected one image in and one out."
                )
        (name,) = _ends(config["input_layers"])
        layers = [
            layer for layer in layers if (layer.get("name") or layer["config"]["name"]) == name
        ]
    if not layers:
        raise CheckpointError(f"{path}: has no layers.")
    first = layers[0]["config"]
    built = layers[0].get("build_config") or {}
    shape = first.get("batch_shape") or first.get("batch_input_shape")
    if shape is None and "layers" in first:
        return _input_shape(path, layers[0])
    whole = config.get("build_input_shape") if isinstance(config, dict) else None
    shape = shape or built.get("input_shape") or whole
    if not isinstance(shape, list):
        raise CheckpointError(
            f"{path}: does not say the shape of its input; begin the model with keras.Input(...)."
        )
    return shape


def _ends(layers: Any) -> list[str]:
    """Return the names in `input_layers`: [[name, 0, 0], ...], or [name, 0, 0] for one alone."""
    if not isinstance(layers, list):
        return []
    if layers and isinstance(layers[0], str):
        return [layers[0]]
    return [name for entry in layers for name in _ends(entry)]


def _strides(model: Config) -> tuple[int, ...]:
    """Return the divisors, up to MOST_STRIDE, of all steps down together."""
    total = 1
    for layer in _objects(model):
        config = layer.get("config")
        if layer["class_name"] in DOWN and isinstance(config, dict):
            keys = ("strides", "pool_size", "block_size")
            step = next((config[key] for key in keys if config.get(key)), 1)
            total *= math.lcm(*(step if isinstance(step, list) else [int(step)]))
    if total == 0:
        raise ValueError("a stride of 0")
    return tuple(n for n in range(1, min(total, MOST_STRIDE) + 1) if total % n == 0)


def _clean(node: Any) -> Any:
    """Return a configuration without what trains a model, in float32, as Keras 3 reads it."""
    if isinstance(node, list):
        return [_clean(value) for value in node]
    if not isinstance(node, dict):
        return node
    if node.get("class_name") in ("DTypePolicy", "Policy"):
        return "float32"
    node = {key: _clean(value) for key, value in node.items() if key != "compile_config"}
    if isinstance(node.get("dtype"), str) and node["dtype"] in FLOATS:
        node["dtype"] = "float32"
    name, config = node.get("class_name"), node.get("config")
    if name == "Functional" and "module" in node:
        node["module"] = FUNCTIONAL
    if isinstance(config, dict):
        # Keras 3 knows it of HDF5 alone, where no layer says its module.
        if name != "InputLayer" and "module" in node:
            config.pop("batch_input_shape", None)
        axis = config.get("axis")
        if name == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
            config["axis"] = axis[0]
        for key in GONE.get(str(name), ()):
            config.pop(key, None)
        if name == "LeakyReLU" and "alpha" in config:
            config["negative_slope"] = config.pop("alpha")
        for key in ("batch_shape", "batch_input_shape"):
            if isinstance(config.get(key), list):
                config[key] = [None, *config[key][1:]]
        if name == "InputLayer":
            config["dtype"] = "float32"
        _renumber(config)
        for key in ("input_layers", "output_layers"):
            # Keras 3 takes [[name, 0, 0]] for a list of one image, and warns of a bare one.
            if isinstance(config.get(key), list) and len(config[key]) == 1:
                config[key] = config[key][0]
    return node


def _renumber(config: Config) -> None:
    """Count the calls of nested models from 0, as Keras 3 does: for Keras 2 their making was 0."""
    layers = config.get("layers")
    if not isinstance(layers, list):
        return
    calls = {layer["name"]: layer["inbound_nodes"] for layer in layers if "inbound_nodes" in layer}
    ends = [config.get("input_layers"), config.get("output_layers")]
    used = list(_references([*calls.values(), *ends]))
    for layer in layers:
        name = layer.get("name")
        nested = isinstance(layer["config"], dict) and "layers" in layer["config"]
        own = [place for place in used if place[0] == name]
        if nested and own and max(place[1] for place in own) >= len(calls[name]):
            for place in own:
                place[1] -= 1


def _references(node: Any) -> Iterator[list[Any]]:
    """Yield the lists [layer, call, output, ...] of a configuration of Keras 2."""
    if isinstance(node, list):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
            yield node
        else:
            for value in node:
                yield from _references(value)


def clean_copy(path: Path, data: bytes, folder: Path) -> Path:
    """Write what is loaded of a file: its cleaned configuration and its weights."""
    zipped = data.startswith(ZIP)
    copy = folder / ("model.keras" if zipped else "model.h5")
    if zipped:
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(copy, "w") as target:
            _refuse_packing(path, source)
            model = _config_of(path, source.read("config.json"))
            weights = source.read("model.weights.h5")
            _check(path, model)
            _check_weights(path, weights)
            target.writestr("metadata.json", source.read("metadata.json"))
            target.writestr("config.json", json.dumps(_clean(model)))
            target.writestr("model.weights.h5", weights)
        return copy
    import h5py

    copy.write_bytes(data)
    with h5py.File(copy, "r+") as file:
        _check_hdf5(path, file)
        config = file.attrs["model_config"]
        model = _config_of(path, config.encode() if isinstance(config, str) else config)
        _check(path, model)
        for name in ("model_config", "training_config"):
            file.attrs.pop(name, None)
        file.attrs["model_config"] = json.dumps(_clean(model))
    return copy


def _check_weights(path: Path, weights: bytes) -> None:
    import h5py

    try:
        with h5py.File(io.BytesIO(weights), "r") as file:
            _check_hdf5(path, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its weights are damaged ({error}).") from error
