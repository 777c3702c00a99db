"""User input works or is refused with one error message. The fuzz tests print how many inputs they try."""

import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets import features

from empssl_jax import training
from empssl_jax.config import Config, DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from empssl_jax.config.command_options import EvaluateOptions, MeasuredData
from empssl_jax.config.errors import DivergenceError, UserError
from empssl_jax.data.datasets import SPLITS, load_split
from empssl_jax.evaluation import embedding_files, embeddings
from empssl_jax.evaluation import evaluate as evaluation
from empssl_jax.method.encoder import EncoderState
from empssl_jax.method.hyperparameters import Hyperparameters, learning_rate
from empssl_jax.run_folder import checkpoints, saved_config
from empssl_jax.run_folder.results import load_results
from empssl_jax.runtime.devices import device_mesh, replicated
from empssl_jax.runtime.user_errors import user_errors_exit
from tests.stress import fuzz

EXAMPLES = 300  # python -m tests.stress.fuzz tries more


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_random_input_works_or_is_refused(kind, tmp_path):
    counts = fuzz.tally(kind, EXAMPLES, tmp_path, derandomize=True)
    print(f"{kind}: {counts['refused']} refused, {counts['worked']} worked")
    assert counts["worked"] > 0
    never_refused = {"metrics.jsonl", "schedules", "traced steps", "train steps"}
    if kind != "evaluations":  # few are tried, and whether their classifier diverges is random
        assert (counts["refused"] == 0) == (kind in never_refused)


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    config = Config(
        DataConfig(dataset="digits"), training=TrainingConfig(batch_size=12), run=RunConfig(workdir=str(tmp_path))
    )
    with pytest.raises(UserError, match="--batch-size is 12: it must be a multiple of the 8 devices"):
        training.train(config)


def test_the_warm_up_leaves_a_step_to_the_cosine():
    hyperparameters = Hyperparameters.of(TrainingConfig(warmup_epochs=0.999, learning_rate=0.5), 4)
    rates = jax.vmap(learning_rate, (0, None))(jnp.arange(4), hyperparameters)
    np.testing.assert_allclose(rates, [0.125, 0.25, 0.375, 0.5], rtol=1e-6)


# Embeddings that would fill the memory.


def bomb(name: str, shape: tuple[int, ...], held: int) -> bytes:
    """An .npz of good arrays, except that `name` declares `shape` and has `held` zero bytes, compressed."""
    file = io.BytesIO()
    np.savez(file, **{"embeddings": np.eye(4, dtype=np.float32), "labels": np.arange(4)} | {name: np.zeros(0)})
    with zipfile.ZipFile(file) as good:
        members = {entry: good.read(entry) for entry in good.namelist()}
    header = io.BytesIO()
    descr = "<f4" if name == "embeddings" else "<i8"
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    members[f"{name}.npy"] = header.getvalue() + bytes(held)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in members.items():
            archive.writestr(entry, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "shape", "held"),
    [
        ("embeddings", (2**20, 2**20), 8),
        ("embeddings", (4, 2**40), 0),
        ("labels", (2**45,), 64),
        ("class_names", (2**31,), 0),
        ("embeddings", (4, 5_000_000), 80_000_000),
    ],
)
def test_embeddings_that_would_fill_the_memory_are_refused_before_they_do(tmp_path, name, shape, held):
    path = tmp_path / "test.npz"
    path.write_bytes(bomb(name, shape, held))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(UserError, match=f"cannot be read .*{name}"):
        embedding_files.read_split(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_compressed_labels_in_the_order_of_their_classes_are_read(tmp_path):
    """As those of a folder of classes, of which deflate leaves less than a two-hundredth."""
    path, labels = tmp_path / "test.npz", np.arange(10).repeat(5000)
    np.savez_compressed(path, embeddings=np.random.default_rng(0).random((50_000, 1)), labels=labels)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("labels.npy").compress_size < labels.nbytes / 300
    np.testing.assert_array_equal(embedding_files.read_split(path).labels, labels)


@pytest.mark.parametrize(("labels", "num_names"), [([0, 1, 2**40], 3), ([0, 1, 2], 100_001), ([0, -2, 2], 3)])
def test_labels_that_are_not_classes_are_refused(tmp_path, labels, num_names):
    names = np.array(["name"] * num_names)
    np.savez(tmp_path / "test.npz", embeddings=np.eye(3), labels=np.array(labels), class_names=names)
    with pytest.raises(UserError, match="number the classes from 0 to at most 99999"):
        embedding_files.read_split(tmp_path / "test.npz")


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"labels": np.zeros(3)}, r"labels has shape \(3,\), type float64 .* instead of 1 dimension of whole numbers"),
        ({"labels": np.zeros((3, 1), int)}, "instead of 1 dimension of whole numbers"),
        ({"embeddings": np.eye(3, dtype=bool)}, "instead of 2 dimensions of real numbers"),
        ({"class_names": np.array([b"a"])}, r"instead of 1 dimension of text \(numpy.str_\)"),
    ],
)
def test_arrays_of_another_type_are_refused_with_the_one_to_give(tmp_path, arrays, expected):
    np.savez(tmp_path / "test.npz", **{"embeddings": np.eye(3), "labels": np.arange(3)} | arrays)
    with pytest.raises(UserError, match=expected):
        embedding_files.read_split(tmp_path / "test.npz")


@pytest.mark.parametrize(("given", "expected"), [(["a", "b"], "a b 2 3"), (None, "0 1 2 3"), (["a"] * 5, "a a a a a")])
def test_classes_without_a_name_are_called_by_their_numbers(tmp_path, given, expected):
    names = {} if given is None else {"class_names": np.array(given)}
    for split in SPLITS:
        np.savez(tmp_path / f"{split}.npz", embeddings=np.eye(3), labels=np.array([0, 1, 3]), **names)
    assert [" ".join(split.class_names) for split in embedding_files.load_both_embeddings(tmp_path)] == [expected] * 2


# Results.


@pytest.fixture
def embeddings_folder(tmp_path):
    for split in ("train", "test"):
        arrays = embeddings.LabelledEmbeddings(np.eye(4, dtype=np.float32), np.arange(4, dtype=np.int32), tuple("abcd"))
        embedding_files.save_embeddings(tmp_path / f"{split}.npz", arrays)
    return tmp_path


def evaluate(folder, **options):
    config = EvaluationConfig(**{"num_neighbours": 1, "linear_epochs": 0} | options)
    return evaluation.evaluate(EvaluateOptions(embeddings=str(folder), evaluation=config), write_report=lambda *_: None)


def test_a_data_set_for_given_embeddings_is_refused(embeddings_folder):
    options = EvaluateOptions(embeddings=str(embeddings_folder), data=MeasuredData(dataset="digits"))
    with pytest.raises(UserError, match=r"^--embeddings is .*: they are measured as they are, so leave out --dataset"):
        evaluation.evaluate(options, write_report=lambda *_: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, "--step is 3: leave it out, since --embeddings are measured as they are"),
        ({"workdir": "runs/a"}, "--workdir is 'runs/a': leave it out"),
        ({"data_dir": "tfds"}, "--data-dir is 'tfds': leave it out"),
        ({"cache_dir": "images"}, "--cache-dir is 'images': leave it out"),
        ({"evaluation": EvaluationConfig(valid_patches=16)}, "--valid-patches is 16: leave it out"),
        ({"evaluation": EvaluationConfig(embedding_batch_size=9)}, "--embedding-batch-size is 9: leave it out"),
        ({"evaluation": EvaluationConfig(untrained=True)}, "--untrained is True: leave it out"),
    ],
)
def test_options_of_a_run_for_given_embeddings_are_refused(embeddings_folder, options, message):
    with pytest.raises(UserError, match=message):
        evaluation.evaluate(EvaluateOptions(embeddings=str(embeddings_folder), **options), lambda *_: None)


@pytest.mark.parametrize(
    "content",
    [
        b'{"kNN": 3}',
        b'{"kNN": {"top1": 0, "top5": 1, "dataset": []}}',
        b"[3]",
        b'{"kNN": {"top1": "0.5", "top5": 1}}',
        b'{"effective rank": {"rank": "31", "images": 10, "dimensions": 40}}',
        b'{"effective rank": {"rank": 31.5, "images": 10}}',
        b"\xff",
        None,
    ],
)
def test_results_that_cannot_be_added_to_are_refused_before_the_work(embeddings_folder, monkeypatch, content):
    path = embeddings_folder / "results.json"
    path.mkdir() if content is None else path.write_bytes(content)
    monkeypatch.setattr(evaluation, "measure_knn", lambda *_: pytest.fail("the evaluation has begun"))
    with pytest.raises(UserError, match=r"results\.json cannot be read .*: delete it"):
        evaluate(embeddings_folder)
    assert content is None or path.read_bytes() == content


def test_the_table_is_shown_even_if_it_cannot_be_written(embeddings_folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "add_results", full)
    with pytest.raises(SystemExit) as caught, user_errors_exit():
        evaluate(embeddings_folder)
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert "kNN             100.00%  100.00%" in shown.out
    assert shown.err == (
        "error: [Errno 28] No space left on device: free disk space, fix the file or give another folder.\n"
    )


def test_an_interruption_before_the_first_result_leaves_no_trace(embeddings_folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "measure_rank", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(embeddings_folder)
    assert not (embeddings_folder / "results.json").exists()


def test_a_linear_classifier_that_diverges_is_reported_and_the_knn_kept(embeddings_folder, capsys):
    with pytest.raises(DivergenceError, match=r"diverged at --linear-learning-rate 1000000000.0: try a lower one"):
        evaluate(embeddings_folder, linear_epochs=9, linear_learning_rate=1e9, linear_weight_decay=1e3)
    assert "kNN             100.00%  100.00%" in capsys.readouterr().out
    rank = {"rank": pytest.approx(4, rel=1e-5), "images": 4, "dimensions": 4}  # of the identity
    measured = load_results(embeddings_folder)
    assert len({result.pop("files") for result in measured.values()}) == 1
    assert measured == {"kNN": {"top1": 1.0, "top5": 1.0}, "effective rank": rank}


def test_results_of_files_that_were_replaced_leave(embeddings_folder, capsys):
    evaluate(embeddings_folder, linear_epochs=1)
    evaluate(embeddings_folder)
    assert set(load_results(embeddings_folder)) == {"kNN", "linear", "linear, best epoch on test", "effective rank"}
    np.savez(embeddings_folder / "test.npz", embeddings=-np.eye(4), labels=np.arange(4))
    evaluate(embeddings_folder)
    assert set(load_results(embeddings_folder)) == {"kNN", "effective rank"}
    removed = "effective rank, kNN, linear, linear, best epoch on test"
    assert f"results.json no longer has results of other embeddings: {removed}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 4.00 TiB"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4000000000000 bytes."),
        RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 43585457712 bytes."),
    ],
)
def test_too_little_memory_gets_an_error_message(error, capsys):
    with pytest.raises(SystemExit) as caught, user_errors_exit():
        raise error
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: out of memory ({error}): end other programs, ")


def test_xla_s_out_of_memory_error_is_recognised(capsys):
    with pytest.raises(SystemExit), user_errors_exit():
        jax.block_until_ready(jnp.zeros((2**20, 2**24)))
    assert "error: out of memory (" in capsys.readouterr().err


PRINTS = """
from empssl_jax.runtime.user_errors import user_errors_exit
with user_errors_exit():
    print("a line", flush={})
"""


@pytest.mark.parametrize(("flush", "code", "said"), [(True, 141, "error: the program that reads "), (False, 0, "")])
def test_output_that_nothing_reads_leaves_no_trace(flush, code, said):
    reader, writer = os.pipe()
    os.close(reader)
    command, environment = [sys.executable, "-c", PRINTS.format(flush)], os.environ | {"PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    error = process.communicate()[1].decode()
    assert process.returncode == code
    assert error.startswith(said)
    assert error.count("\n") == bool(said)


def test_other_errors_keep_their_traces():
    with pytest.raises(RuntimeError, match="a mistake"), user_errors_exit():
        raise RuntimeError("a mistake")


# Data sets, as TFDS prepares them.


class Pictures(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set with the features and examples that a test sets."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: dict = {}  # noqa: RUF012
    EXAMPLES: dict = {}  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(self.FEATURES))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.EXAMPLES}

    def _generate_examples(self, split):
        yield from enumerate(self.EXAMPLES[split])


PIXELS = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
OPAQUE, FAINT = np.dstack([PIXELS, np.full((8, 8), 255, np.uint8)]), np.dstack([PIXELS, np.full((8, 8), 9, np.uint8)])
DEEP = np.random.RandomState(0).randint(0, 2**16, (8, 8)).astype(np.uint16)
GRAY = np.repeat(PIXELS[..., :1], 3, axis=2)


def encoded(image, kind="png", **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def load_pictures(monkeypatch, folder, images, labels=(0, 1, 2, 1), image=None, label=None, splits=SPLITS):
    """Loads the training images of a data set whose splits all have these images."""
    kinds = {"image": image or features.Image(), "label": label or features.ClassLabel(num_classes=3)}
    monkeypatch.setattr(Pictures, "FEATURES", kinds)
    examples = [{"image": i, "label": j} for i, j in zip(images, labels, strict=False)]
    monkeypatch.setattr(Pictures, "EXAMPLES", dict.fromkeys(splits, examples))
    return load_split(DataConfig(dataset="pictures"), "train", str(folder))


PALETTE = PIL.Image.fromarray(PIXELS).convert("P")
WORKS = {
    "RGB": (encoded(PIXELS), PIXELS, None),
    "an array": (PIXELS, PIXELS, None),
    "one channel": (encoded(PIXELS[..., 0]), GRAY, None),
    "an array of one channel": (PIXELS[..., :1], GRAY, features.Image(shape=(8, 8, 1))),
    "RGBA": (encoded(FAINT), PIXELS, None),
    "an array of RGBA": (OPAQUE, PIXELS, features.Image(shape=(8, 8, 4))),
    "palette": (encoded(PALETTE), np.asarray(PALETTE.convert("RGB")), None),
    "a transparent palette": (encoded(PALETTE, transparency=bytes(9)), np.asarray(PALETTE.convert("RGB")), None),
    "GIF": (encoded(PALETTE, "gif"), np.asarray(PALETTE.convert("RGB")), None),
    "black and white": (encoded(PIL.Image.new("1", (8, 8), 1)), np.full((8, 8, 3), 255), None),
    "another size": (encoded(np.tile(PIXELS, (4, 4, 1))), np.tile(PIXELS, (4, 4, 1)), None),
    "16 bits": (encoded(DEEP), np.repeat(DEEP[..., None] // 256, 3, axis=2), None),
    "one pixel": (encoded(PIXELS[:1, :1]), PIXELS[:1, :1], None),
}


@pytest.mark.parametrize("case", WORKS)
def test_images_become_rgb_without_tensorflow(case, monkeypatch, tmp_path):
    given, expected, image = WORKS[case]
    loaded = load_pictures(monkeypatch, tmp_path, [given] * 4, image=image)
    np.testing.assert_array_equal(loaded.images, np.stack([expected] * 4))
    assert (sorted(loaded.labels), loaded.num_classes) == ([0, 1, 1, 2], 3)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("label", [features.Scalar(dtype=np.int64), features.Text()])
def test_labels_that_are_not_classes_are_ignored(label, monkeypatch, tmp_path):
    labels = ["a", "b"] if isinstance(label, features.Text) else [0, 5]
    loaded = load_pictures(monkeypatch, tmp_path, [PIXELS] * 2, labels, label=label)
    assert (loaded.labels.tolist(), loaded.num_classes) == ([-1, -1], 0)


def test_one_class_works(monkeypatch, tmp_path):
    label = features.ClassLabel(num_classes=1)
    loaded = load_pictures(monkeypatch, tmp_path, [PIXELS] * 4, [0] * 4, label=label)
    assert (loaded.labels.tolist(), loaded.num_classes) == ([0] * 4, 1)


GOOD = encoded(PIXELS)
REFUSED = {
    "16 bits, said so": (
        {"images": [encoded(DEEP)], "image": features.Image(shape=(8, 8, 1), dtype=np.uint16)},
        "8-bit",
    ),
    "floats": (
        {"images": [encoded(np.eye(8, dtype=np.float32), "tiff")]},
        "Image 0 of pictures train .*mode is F instead of 8",
    ),
    "no image": ({"images": [GOOD, b"nonsense"]}, r"Image \d of pictures train cannot be decoded \(no known format\)"),
    "no bytes": ({"images": [b""]}, "no known format"),
    "half a JPEG": ({"images": [encoded(PIXELS, "jpeg")[:300]]}, "cannot be decoded"),
    "not square": ({"images": [encoded(PIXELS[:4])]}, r"shapes \[\(4, 8, 3\)\]: they must be squares of one size"),
    "two sizes": ({"images": [GOOD, encoded(PIXELS[:4, :4])]}, r"\[\(4, 4, 3\), \(8, 8, 3\)\]: they must be squares"),
    "tensors": (
        {"images": [PIXELS], "image": features.Tensor(shape=(8, 8, 3), dtype=np.uint8)},
        "images of type Tensor",
    ),
    "no test split": ({"images": [GOOD], "splits": ["train"]}, "no test split"),
    "no images": ({"images": []}, "cannot be downloaded"),  # TFDS itself refuses to prepare an empty split
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_data_sets_are_refused(case, monkeypatch, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load_pictures(monkeypatch, tmp_path, **options)


def moved(folder: Path) -> Path:
    """Renames the data set to a name without a TFDS builder; returns its new folder."""
    shutil.move(folder / "pictures", folder / "moved")
    version = folder / "moved" / "1.0.0"
    for path in version.iterdir():
        path.rename(path.with_name(path.name.replace("pictures", "moved")))
    replace(version, "dataset_info.json", "pictures", "moved")
    return version


def replace(folder: Path, name: str, old: str, new: str):
    path = folder / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def record(folder: Path) -> Path:
    return next(folder.glob("*-train.array_record*"))


DAMAGE = {
    "a record cut short": (
        lambda f: record(f).write_bytes(record(f).read_bytes()[:-20]),
        "cannot be read .*delete that",
    ),
    "an empty record": (lambda f: record(f).write_bytes(b""), "cannot be read .*delete that"),
    "no record": (lambda f: record(f).unlink(), "cannot be read .*delete that"),
    "no JSON": (lambda f: (f / "dataset_info.json").write_text("{"), "cannot be opened"),
    "another JSON": (lambda f: (f / "dataset_info.json").write_text("[]"), "cannot be opened"),
    "no information": (lambda f: (f / "dataset_info.json").unlink(), "cannot be opened"),
    "no features": (lambda f: (f / "features.json").unlink(), "not known to TFDS"),
    "other features": (lambda f: (f / "features.json").write_text("{"), "cannot be opened"),
    "TFRecords": (
        lambda f: replace(f, "dataset_info.json", "array_record", "tfrecord"),
        "its files are for TensorFlow",
    ),
    "too few images": (lambda f: replace(f, "dataset_info.json", '"4"', '"40"'), "cannot be read .*delete that"),
    "too few classes": (lambda f: replace(f, "features.json", '"3"', '"2"'), "labels from 0 to 2, and 2 classes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data_sets_are_refused(case, monkeypatch, tmp_path):
    load_pictures(monkeypatch, tmp_path, [GOOD] * 4)
    folder = moved(tmp_path)
    assert load_split(DataConfig(dataset="moved"), "train", str(tmp_path)).images.shape == (4, 8, 8, 3)
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_split(DataConfig(dataset="moved"), "train", str(tmp_path))


NAMES = ["a b", "../x", "/etc/passwd", "pictures:9.9.9", "pictures:x", "pictures/none", "pictures/x=1", "none:foo"]
NAMES += ["kaggle:foo", "pictures/", "a" * 1000, "ä", ".", "cifar10:1.0.0"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:15])
def test_odd_names_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"^--dataset '.*(is not known to TFDS|cannot be opened).*\.$"):
        load_split(DataConfig(dataset=name), "train", str(tmp_path))


@pytest.mark.parametrize("folder", [__file__, "/dev/null", "/proc/none"])
def test_a_data_folder_that_cannot_be_written_to_is_refused(folder, monkeypatch):
    with pytest.raises(UserError, match=f"pictures is not in {folder}/.* give the folder that has it as --data-dir"):
        load_pictures(monkeypatch, folder, [GOOD])


def test_cifar10_is_prepared_without_tensorflow(monkeypatch, tmp_path):
    """Runs TFDS's own builder on files in the format of the real ones."""
    source = tmp_path / "source" / "cifar-10-batches-bin"
    source.mkdir(parents=True)
    records = np.random.RandomState(0).randint(0, 10, (6, 2, 3073)).astype(np.uint8)
    for name, content in zip(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))], records, strict=True):
        (source / f"{name}.bin").write_bytes(content.tobytes())
    (source / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(source.parent))
    test = load_split(DataConfig(), "test", str(tmp_path / "prepared"))
    expected = {bytes(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)): record[0] for record in records[0]}
    assert {bytes(image): label for image, label in zip(test.images, test.labels, strict=True)} == expected
    assert len(load_split(DataConfig(), "train", str(tmp_path / "prepared")).labels) == 10
    assert "tensorflow" not in sys.modules


FOLDERS = {  # of the images that TFDS's builders look for, two classes, and the files' suffix
    "eurosat": (["source/2750"], ["AnnualCrop", "Forest"], ".jpg"),
    "imagenette/160px-v2": (
        [f"source/imagenette2-160/{split}" for split in ("train", "val")],
        ["n01440764", "n02102040"],
        ".JPEG",
    ),
    "caltech101": (["source/101_ObjectCategories"], ["accordion", "airplanes"], ".jpg"),
    "resisc45": (["prepared/downloads/manual/NWPU-RESISC45"], ["airplane", "airport"], ".jpg"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_data_sets_of_image_files_are_prepared_without_tensorflow(name, monkeypatch, tmp_path):
    """Runs TFDS's own builders, which find files with `tf.io.gfile`, on 31 images of one colour in each folder."""
    folders, classes, suffix = FOLDERS[name]
    for folder, (label, class_name) in itertools.product(folders, enumerate(classes)):
        (tmp_path / folder / class_name).mkdir(parents=True)
        for number in range(31):
            path = tmp_path / folder / class_name / f"{class_name}_{number}{suffix}"
            PIL.Image.new("RGB", (8, 8), (100 * label,) * 3).save(path)
    for method in ("download_and_extract", "extract"):
        monkeypatch.setattr(tfds.download.DownloadManager, method, lambda self, _: tmp_path / "source")
    config = DataConfig(dataset=name, train_split="train[:60]", test_split="train[60:]")
    train = load_split(config, "train", str(tmp_path / "prepared"), str(tmp_path / "cache"))
    colours = [100 * classes.index(train.class_names[label]) for label in train.labels]
    assert (len(colours), set(colours)) == (60, {0, 100})
    np.testing.assert_array_equal(train.images, np.broadcast_to(np.reshape(colours, (60, 1, 1, 1)), (60, 8, 8, 3)))
    assert "tensorflow" not in sys.modules


# Folders that are not checkpoints.


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def state(value: float):
    encoder = EncoderState({"w": jnp.full((4, 3), value)}, {"mean": jnp.full(3, -value)})
    return encoder, ({"trace": jnp.arange(5.0)}, jnp.int32(7))


@pytest.fixture
def run_folder(tmp_path):
    with checkpoints.Checkpoints(tmp_path / "run") as store:
        store.save(3, *state(3.0), loss=-1.0)
    return tmp_path / "run"


def restore(workdir, template=None):
    template = template or jax.eval_shape(lambda: state(0.0))
    with checkpoints.Checkpoints(workdir) as store:
        return store.restore(*template, replicated(device_mesh(1)), "latest")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_unpickled_from_checkpoints(run_folder, tmp_path):
    trap = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Planted(trap)))
    trap.rmdir()
    unpickled = []
    sys.addaudithook(lambda event, arguments: unpickled.append(arguments) if event == "pickle.find_class" else None)
    names = sorted(path.relative_to(run_folder) for path in run_folder.rglob("*") if path.is_file())
    restored = 0
    for i, name in enumerate([None, *names]):
        workdir = shutil.copytree(run_folder, tmp_path / str(i))
        for path in [workdir / name] if name else [path for path in workdir.rglob("*") if path.is_file()]:
            path.write_bytes(pickle.dumps(Planted(trap)))
        try:
            _, encoder, _ = restore(workdir)
            np.testing.assert_array_equal(encoder.params["w"], np.full((4, 3), 3.0))
            restored += 1
        except UserError:
            pass
    print(f"pickles instead of {len(names)} files: restored {restored} times, never run")
    assert restored < len(names)
    assert not trap.exists()
    assert unpickled == []


def foreign(workdir):
    (workdir / "checkpoints" / "epoch=3.ckpt").mkdir(parents=True)
    (workdir / "checkpoints" / "model.safetensors").write_bytes(b"x")


def empty_step(workdir):
    (workdir / "checkpoints" / "9").mkdir(parents=True)


def step_loop(workdir):
    (workdir / "checkpoints").mkdir()
    (workdir / "checkpoints" / "3").symlink_to(workdir / "checkpoints" / "3")


ODD_FOLDERS = {
    "a file": lambda workdir: (workdir / "checkpoints").write_text("x"),
    "a loop": lambda workdir: (workdir / "checkpoints").symlink_to(workdir / "checkpoints"),
    "a dangling link": lambda workdir: (workdir / "checkpoints").symlink_to(workdir / "nowhere" / "else"),
    "another project's": foreign,
    "an empty step": empty_step,
    "a step that is a loop": step_loop,
}


@pytest.mark.parametrize("case", ODD_FOLDERS)
def test_folders_without_checkpoints_are_refused(case, tmp_path):
    ODD_FOLDERS[case](tmp_path)
    with pytest.raises(UserError):
        restore(tmp_path)


def test_a_file_instead_of_checkpoints_is_refused_before_training(tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(UserError), checkpoints.Checkpoints(tmp_path) as store:
        store.latest_step()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("shape", [(5, 3), (4,), (12,), (4, 3, 1)])
def test_a_checkpoint_of_another_model_is_refused(run_folder, shape):
    encoder, optimizer = state(0.0)
    with pytest.raises(UserError):
        restore(run_folder, jax.eval_shape(lambda: (encoder._replace(params={"w": jnp.zeros(shape)}), optimizer)))
    with pytest.raises(UserError):
        restore(run_folder, jax.eval_shape(lambda: (encoder._replace(params={"v": jnp.zeros((4, 3))}), optimizer)))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 10**5, b'{"training": {"seed": 1.5}}', b'{"seed": 1}', b"3", b""]
)
def test_an_invalid_config_json_is_refused_by_name(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^.*config\.json (is not a config|has a wrong value).*\.$"):
        saved_config.load_config(tmp_path)


def test_a_wrong_value_in_config_json_is_reported_with_its_option(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"width": "wide"}}))
    with pytest.raises(UserError, match=r"config\.json has a wrong value: --width is 'wide': give a whole number"):
        saved_config.load_config(tmp_path)
