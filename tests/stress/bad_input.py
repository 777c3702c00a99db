"""Hypothesis strategies for every kind of input from a user, mostly invalid."""

import dataclasses
import io
import json
import math
import sys
import typing
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import PIL.Image
import safetensors.numpy
from hypothesis import strategies as st

from empssl_jax.config import Config, ModelConfig, checked_fields
from empssl_jax.config.errors import flag
from empssl_jax.config.run_config import SMALLEST_EPS
from empssl_jax.inference.torch_names import to_torch
from empssl_jax.method.encoder import encoder_template
from empssl_jax.run_folder import saved_config

GROUPS: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(Config)}
OPTIONS = {name: [field.name for field in dataclasses.fields(group)] for name, group in GROUPS.items()}
NUMBERS = st.integers() | st.floats() | st.sampled_from([-(2**63), 2**31, 1e-320, 1e308, 0, -0.0, 1])
NUMBERS |= st.builds(pow, st.just(10), st.just(5000))  # more digits than Python prints
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
OTHER_VALUES = [b"", object(), 1j, (), {1}, "\0", "\ud800", "x" * 10**5, "a\nb", type, np.float32(0.1), np.int64(3)]
OTHER_VALUES += [np.zeros(3), float("nan"), float("inf"), np.float64("nan"), range(3), Config, lambda: 0]
VALUES = JSON_VALUES | st.sampled_from(OTHER_VALUES)


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a bit flipped, a piece removed, zeroed or doubled, or the rest cut off, in up to three places."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([1, 4, 50])))
        piece = content[start:stop]
        changed = [
            bytes(b ^ 1 << draw(st.integers(0, 7)) for b in piece[:1]) + piece[1:],
            b"",
            bytes(len(piece)),
            piece * 2,
        ]
        content[start:stop] = draw(st.sampled_from(changed))
        if draw(st.integers(0, 9)) == 0:
            del content[start:]
    return bytes(content)


def as_json(value: object) -> bytes:
    """The value as JSON, including integers with thousands of digits."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(limit)


# --- Options ---


def some_options(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Up to four options of a group with any values, sometimes their defaults."""
    fields = {field.name: VALUES | st.just(field.default) for field in dataclasses.fields(GROUPS[name])}
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: dict(list(values.items())[:4]))


ANY_OPTIONS = st.fixed_dictionaries({}, optional={name: some_options(name) | VALUES for name in GROUPS})
SOME_MODEL = st.fixed_dictionaries({"model": st.dictionaries(st.sampled_from(OPTIONS["model"]), JSON_VALUES)})
CONFIG_JSON = damaged(st.just(saved_config.to_json(Config()).encode())) | JSON_VALUES.map(as_json)
CONFIG_JSON |= st.binary(max_size=50) | SOME_MODEL.map(as_json)

STATEMENTS = [
    *("config = Config()", "config = Config", "config = None", "config = Config(data=3)", "config = (Config(),)"),
    *("config = Config(training=TrainingConfig(seed=1))", "TrainingConfig(learning_rate=-1)", "config.data = 3"),
    *("raise SystemExit(3)", "exit()", "import sys; sys.exit('bye')", "import nothing_there", "def", "x = (", "\0"),
    *("raise Exception('a\\nb')", "raise UserError('No.')", "def f(): f()\nf()", "assert False", "raise KeyError"),
    *("raise StopIteration", "raise MemoryError", "raise Exception('x' * 10**5)", "x = '\ud800'", "print('\u2028')"),
    *("1/0", "del config", "\tx = 1", "x = 1", "import math"),
]
FIRST_LINES = ["from empssl_jax.config import *", "config = Config()"]
CONFIG_FILES = st.lists(st.sampled_from(STATEMENTS), max_size=2).map(
    lambda lines: "\n".join(FIRST_LINES + lines).encode("utf-8", "surrogatepass")
)


def npz(savez: Callable[..., None] = np.savez, **arrays: np.ndarray) -> bytes:
    """The bytes of an .npz file."""
    file = io.BytesIO()
    savez(file, **arrays)
    return file.getvalue()


GOOD_ARRAYS = {
    "embeddings": np.arange(12, dtype=np.float32).reshape(4, 3),
    "labels": np.array([0, 1, 2, 1]),
    "class_names": np.array(["cat", "dog", "ox"]),
}
GOOD_NPZ = st.sampled_from([npz(savez, **GOOD_ARRAYS) for savez in (np.savez, np.savez_compressed)])
TYPES = ["<f4", "<f8", "<f2", "<i8", "<i4", "<u8", "|b1", "<c8", "|O", "|S3", "<U2", "<M8[s]", "|V4", "nonsense"]
SIZES = st.sampled_from([0, 1, 2, 4, 2**20, 2**31, 2**62, -1])


@st.composite
def announced_npz(draw: st.DrawFn) -> bytes:
    """An .npz whose headers declare any shapes and types, followed by a few bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in draw(st.lists(st.sampled_from(["embeddings", "labels", "class_names", "x"]), unique=True)):
            shape, descr = tuple(draw(st.lists(SIZES, max_size=3))), draw(st.sampled_from(TYPES))
            header = repr({"descr": descr, "fortran_order": draw(st.booleans()), "shape": shape}).encode() + b"\n"
            start = b"\x93NUMPY" + bytes([draw(st.sampled_from([1, 2, 3, 9])), 0])
            content = start + len(header).to_bytes(2, "little") + header + draw(st.binary(max_size=64))
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


ARRAYS = st.sampled_from(
    [np.eye(4, 3), np.eye(4, dtype=bool), np.full((4, 3), 1e300), np.eye(4) * 1j, np.float32(3), np.zeros((4, 0))]
)
ARRAYS |= st.sampled_from(
    [np.full((4, 3), np.nan), np.full((4, 3), "1"), np.eye(4, dtype=np.float16), np.full((4, 3), 1e30)]
)
LABELS = st.lists(NUMBERS, min_size=1, max_size=5).filter(lambda x: np.array(x).dtype != object).map(np.array)
LABELS |= st.lists(st.integers(-1, 9) | st.just(2**40), min_size=4, max_size=4).map(np.array)
TEXTS = st.lists(st.text(max_size=5), max_size=9).map(lambda names: np.array(names, np.str_))
OTHER_NPZ = st.fixed_dictionaries({"embeddings": ARRAYS, "labels": LABELS}, optional={"class_names": LABELS | TEXTS})
EMBEDDINGS = damaged(GOOD_NPZ) | announced_npz() | OTHER_NPZ.map(lambda arrays: npz(**arrays)) | st.binary(max_size=100)

TOP1_TOP5 = {"top1": NUMBERS | JSON_VALUES, "top5": st.floats(0, 1)}
ACCURACIES = st.fixed_dictionaries(TOP1_TOP5, optional={"x": JSON_VALUES})
RESULTS = (JSON_VALUES | st.dictionaries(st.text(max_size=5), ACCURACIES, max_size=3)).map(as_json)
RESULTS |= st.binary(max_size=50)
RESULTS |= damaged(st.just(as_json({"kNN": {"top1": 0.5, "top5": 0.9}}))) | st.just(b"[" * 10**5)

STEPS = st.integers(0, 9).map(lambda step: (step, b'{"step": %d, "loss": 1.0}' % step))
NO_STEPS = [b'{"step": "3"}', b'{"step": null}', b'{"step": NaN}', b'{"step": true}', b'{"step": 1.5}']
NO_STEPS += [b'{"step": -1}', b"[1]", b'{"step": 3, "lo', b'{"loss": 1.0}', b"\0\0\0", b"\xff\xfe", b"[" * 10**5]
NO_STEPS += [b'{"step": ' + b"9" * 5000 + b"}", b"", b"3"]
METRICS = st.lists(STEPS | st.sampled_from(NO_STEPS).map(lambda line: (None, line)), max_size=8)


def weight_file() -> tuple[dict[str, Any], bytes]:
    """Header and data of a .safetensors file with a tiny ResNet, all zeros."""
    made = ModelConfig(width=1, hidden_dim=1, projection_dim=2, precision="float32")
    zeros = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), encoder_template(made))
    content = safetensors.numpy.save(to_torch(zeros, made, 0))
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), bytes(len(content) - 8 - size)


METADATA_TEXTS = st.sampled_from(["32", "-3", "224x224", "0.5 0.5 0.5", "1 2", "nan nan nan", "{}"]) | st.text()
METADATA = st.dictionaries(
    st.sampled_from(["image_size", "config", "input_mean", "input_std", "x"]),
    METADATA_TEXTS | CONFIG_JSON.map(lambda content: content.decode("utf-8", "replace")) | JSON_VALUES,
)
HEADER_FIELDS = {"dtype": st.sampled_from(["F32", "I32", "BF16", "BOOL", "F8_E4M3", "x"]) | JSON_VALUES}
HEADER_FIELDS |= {"shape": st.lists(SIZES) | JSON_VALUES, "data_offsets": st.lists(SIZES) | JSON_VALUES}


@st.composite
def weight_files(draw: st.DrawFn, header: dict[str, Any], data: bytes) -> bytes:
    """A .safetensors file with any metadata, up to two changed entries, names after a prefix, or damage.

    Compressed by zlib, since Hypothesis prints no input as long as the file.
    """
    header = dict(header)
    for name in draw(st.lists(st.sampled_from(sorted(header)), max_size=2)):
        header[name] = {**header[name], **draw(st.fixed_dictionaries({}, optional=HEADER_FIELDS))}
    prefix = draw(st.sampled_from(["", "module.", "a.b.", "layer1.0.", "backbone."]) | st.text(max_size=3))
    header = {prefix + name: entry for name, entry in header.items()} | {"__metadata__": draw(METADATA)}
    content = as_json(header)
    content = len(content).to_bytes(8, "little") + content + data
    return zlib.compress(draw(damaged(st.just(content))) if draw(st.booleans()) else content)


def encoded(mode: str, kind: str) -> bytes:
    """The bytes of a small image file."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode).save(file, kind)
    return file.getvalue()


MODES = [("RGB", "png"), ("RGB", "jpeg"), ("L", "jpeg"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("CMYK", "jpeg")]
MODES += [("1", "png"), ("I;16", "png"), ("F", "tiff"), ("LA", "png"), ("RGB", "bmp"), ("RGB", "webp")]
PICTURES = damaged(st.sampled_from([encoded(*mode) for mode in MODES])) | st.binary(max_size=50)

TINY = {"train_patches": 3, "patch_size": 40, "width": 3, "hidden_dim": 6, "projection_dim": 6, "batch_size": 5}
TINY |= {"max_epochs": 3, "warmup_epochs": 3.0, "valid_patches": 3, "num_neighbours": 5, "linear_epochs": 3}


def valid_values(field: dataclasses.Field, annotation: object) -> st.SearchStrategy:
    """Valid values of an option, often its lowest and highest; sizes are small."""
    allowed = checked_fields._allowed(field, annotation)
    if isinstance(allowed, checked_fields.Choice):
        return st.sampled_from(allowed.values)
    if not isinstance(allowed, checked_fields.Range):
        return st.just(field.default)
    high = min(allowed.high, TINY.get(field.name, allowed.high))
    inside = st.integers(allowed.low, high) if allowed.is_integer else st.floats(allowed.low, high)
    return st.sampled_from([allowed.low, high]) | inside


FLAGS = [flag(option) for options in OPTIONS.values() for option in options]
WORDS = ["", "-1", "0", "1", "nan", "inf", "1e400", "None", "True", "1e3", "9" * 5000, "\ud800", "x" * 2000, "a b"]
WORDS += ["\n", "auto", "digits", "configs/digits.py", "/dev/null", "configs", "-", "--", "--help", "--config"]
WORDS += ["--model.width", "--no-remat", "--x"]
ARGUMENTS = st.lists(
    st.sampled_from(FLAGS + WORDS) | st.tuples(st.sampled_from(FLAGS), st.sampled_from(WORDS)).map("=".join), max_size=4
)

SCALES = st.sampled_from([0, 1e-30, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e17])


@st.composite
def tiny_configs(draw: st.DrawFn) -> Config:
    """Any valid config with tiny sizes."""
    groups: dict[str, Any] = {}
    for name, group in GROUPS.items():
        hints = typing.get_type_hints(group)
        values = {field.name: draw(valid_values(field, hints[field.name])) for field in dataclasses.fields(group)}
        if name == "distributed":
            values = {}  # the defaults: one process
        if name == "training":
            values["warmup_epochs"] = min(values["warmup_epochs"], np.nextafter(values["max_epochs"], 0).item())
            smallest = SMALLEST_EPS * groups["model"].projection_dim
            values["coding_rate_eps"] = max(values["coding_rate_eps"], smallest)
            values["accumulate"] = math.gcd(values["accumulate"], groups["patches"].train_patches)
        if name == "evaluation" and values["valid_crops"] == "random":
            values["cells"] = 1
        elif name == "evaluation":
            side = math.isqrt(values["valid_patches"])
            values |= {"valid_patches": side**2, "cells": math.gcd(values["cells"], side) if side else 1}
        groups[name] = group(**values)
    return Config(**groups)
