"""Tries random input of every kind: each must either work or be refused with one sentence.

    python -m tests.stress.fuzz --examples 10000

Prints for each kind how many inputs were tried, refused with a sentence, worked and failed; the last must be 0.
tests/test_bad_input.py tries fewer of each.
"""

import collections
import contextlib
import dataclasses
import io
import re
import tempfile
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from hypothesis import strategies as st

from empssl_jax.config import Config, DistributedConfig
from empssl_jax.config.command_options import ImportOptions
from empssl_jax.config.config_files import parse_train_options, read_config_file
from empssl_jax.config.errors import UserError
from empssl_jax.data import decoding
from empssl_jax.data.batches import Batch
from empssl_jax.evaluation import embedding_files, embeddings
from empssl_jax.evaluation.class_names import complete_names
from empssl_jax.evaluation.evaluate import measure_knn, measure_linear
from empssl_jax.inference.import_weights import read_run
from empssl_jax.method import losses
from empssl_jax.method.hyperparameters import Hyperparameters, learning_rate
from empssl_jax.method.train_step import create_state, make_train_step
from empssl_jax.run_folder import saved_config, step_files
from empssl_jax.run_folder.digests import first_not_finite
from empssl_jax.run_folder.results import add_results, load_results
from empssl_jax.runtime.devices import device_mesh
from tests.stress import bad_input
from tests.stress.bad_input import GROUPS, OPTIONS

SETTINGS = hypothesis.settings(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))


def make_config(groups: dict[str, Any], folder: Path) -> None:
    """A config is refused with the name of an option, or is equal after a round trip through JSON.

    The group `distributed` is not saved.
    """
    try:
        made = Config(
            **{k: GROUPS[k](**v) if isinstance(v, dict) and set(v) <= set(OPTIONS[k]) else v for k, v in groups.items()}
        )
    except UserError as error:
        if str(error).split(" is ")[0] not in set(bad_input.FLAGS) | {f"Config's {name}" for name in GROUPS}:
            raise AssertionError("The message does not name an option.") from error
        raise
    expected = dataclasses.replace(made, distributed=DistributedConfig())
    assert saved_config.from_json(saved_config.to_json(made), "config.json") == expected


def read_config_json(content: bytes, folder: Path) -> None:
    """A config.json is refused or gives a config."""
    assert isinstance(saved_config.from_json(content, folder / "config.json"), Config)


def run_config_file(content: bytes, folder: Path) -> None:
    """A config file is refused or gives a config."""
    path = folder / "config.py"
    path.write_bytes(content)
    assert isinstance(read_config_file(str(path)), Config)


def parse(arguments: list[str], folder: Path) -> None:
    """The command line is refused with a message and exit code 2, gives a config, or prints the help."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            parsed = parse_train_options(["--config", "digits", *arguments])
        assert isinstance(parsed, Config)
    except SystemExit as error:
        assert shown.getvalue()
        if error.code not in (0, 2):
            raise AssertionError("The exit code is neither 0 nor 2.") from error
        if error.code == 2:
            raise UserError("The command line was refused.") from error


def load_embeddings(content: bytes, folder: Path) -> None:
    """Embeddings are refused, or finite and with valid labels: a class's number, or -1 for none."""
    path = folder / "test.npz"
    path.write_bytes(content)
    split = embedding_files.read_split(path)
    loaded = split._replace(class_names=complete_names(split, ()))
    assert loaded.embeddings.dtype == np.float32
    assert len(loaded.embeddings) == len(loaded.labels) > 0
    assert np.isfinite(np.linalg.norm(loaded.embeddings, axis=1)).all()
    assert -1 <= loaded.labels.min() <= loaded.labels.max() < loaded.num_classes <= embedding_files.MAX_CLASSES


def add_to_results(content: bytes, folder: Path) -> None:
    """Results are refused, or kept when others are added."""
    path = folder / "results.json"
    path.write_bytes(content)
    before = load_results(folder)
    after = add_results(folder, {"new": {"top1": 0.5, "top5": 1.0}})
    assert repr(after | before) == repr(load_results(folder) | before)
    assert before.keys() <= after.keys()


def resume_metrics(lines: list[tuple[int | None, bytes]], folder: Path) -> None:
    """Exactly the lines of the steps before the resumption are kept in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(line for _, line in lines))
    step_files.drop_steps_from(path, 5)
    assert path.read_bytes() == b"".join(line + b"\n" for step, line in lines if step is not None and step < 5)


def decode(content: bytes, folder: Path) -> None:
    """An image is refused or gives RGB pixels."""
    try:
        image = decoding.decode(content, None)
    except decoding.UnreadableError as error:
        raise UserError(f"The image is refused: {error}.") from error
    assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


def import_file(example: tuple[bytes, bool], folder: Path) -> None:
    """A file of weights is refused or gives finite arrays, a valid config and a valid image size."""
    content, fresh_heads = example
    path = folder / "weights.safetensors"
    path.write_bytes(zlib.decompress(content))
    imported = read_run(ImportOptions(str(path), str(folder / "run"), None, fresh_heads))
    assert not (folder / "run").exists()
    assert first_not_finite(imported.encoder) is None
    assert saved_config.from_json(saved_config.to_json(imported.config), "config.json") == imported.config
    assert 1 <= imported.image_size <= saved_config.MAX_IMAGE_SIZE


def prepare(made: Config, side: int, steps_per_epoch: int = 2) -> tuple[Config, Hyperparameters, Any, Batch]:
    """The config with "auto" as float32, its hyperparameters, its step on one device, and a batch of noise images."""
    precision = "float32" if made.model.precision == "auto" else made.model.precision
    made = dataclasses.replace(made, model=dataclasses.replace(made.model, precision=precision))
    hyperparameters, size = Hyperparameters.of(made.training, steps_per_epoch), made.training.batch_size
    train_step = make_train_step(made, device_mesh(1))
    images = np.random.RandomState(0).randint(0, 256, (size, side, side, 3)).astype(np.uint8)
    return made, hyperparameters, train_step, Batch(images, np.arange(size, dtype=np.int32))


def trace(example: tuple[Config, int], folder: Path) -> None:
    """The train step can be traced and keeps the shapes and types of its state; embeddings can be traced too."""
    made, hyperparameters, train_step, batch = prepare(*example)
    state = create_state.eval_shape(made.model, hyperparameters, device_mesh(1))
    after, _ = jax.eval_shape(train_step, hyperparameters, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    embedded = jax.eval_shape(embeddings.make_embed(made, device_mesh(1)), state.encoder, *batch)
    assert embedded.shape == (made.training.batch_size, embeddings.embedding_dim(made))


def step(example: tuple[Config, int], folder: Path) -> None:
    """A train step has a finite loss, similarity at most 1 and a coding rate within its bounds."""
    made, hyperparameters, train_step, batch = prepare(*example)
    _, measured = train_step(hyperparameters, create_state(made.model, hyperparameters, device_mesh(1)), batch)
    values = {name: float(value) for name, value in measured.items()}
    assert np.isfinite(list(values.values())).all(), values
    training = made.training
    low, high = losses.coding_rate_bounds(training.batch_size, made.model.projection_dim, training.coding_rate_eps)
    assert low < high
    assert low - 1e-3 <= values["coding_rate"] <= high + 1e-3 * max(1, high)
    assert values["similarity"] <= 1 + 1e-5


def schedule(example: tuple[Config, int], folder: Path) -> None:
    """The learning rate of every step is finite, and between 0 and the peak."""
    made, steps_per_epoch = example
    rates = jax.vmap(learning_rate, (0, None))(jnp.arange(15), Hyperparameters.of(made.training, steps_per_epoch))
    rates = rates[: steps_per_epoch * made.training.max_epochs]
    assert np.isfinite(rates).all()
    assert 0 <= min(rates) <= max(rates) <= made.training.learning_rate * (1 + 1e-6)


def measure(example: tuple[float, Config], folder: Path) -> None:
    """Accuracies of embeddings of any scale are fractions, or the classifier is reported to have diverged."""
    scale, made = example
    random, splits = np.random.RandomState(0), []
    for _ in range(2):
        vectors, labels = np.float32(scale * random.standard_normal((7, 3))), random.randint(0, 3, 7)
        splits.append(embeddings.LabelledEmbeddings(vectors, labels.astype(np.int32), ("a", "b", "c")))
    both = embeddings.Embeddings(*splits)
    accuracies = [measure_knn(both, made.evaluation, device_mesh())]
    if made.evaluation.linear_epochs > 0:
        accuracies += measure_linear(both, made.evaluation, made.training.seed, device_mesh()).values()
    for accuracy in accuracies:
        assert 0 <= accuracy["top1"] <= accuracy["top5"] <= 1


class Kind(NamedTuple):
    """A kind of input, and a check of it that returns, raises UserError, or fails with another error."""

    inputs: st.SearchStrategy
    attempt: Callable[[Any, Path], None]
    share: float = 1.0  # of the requested examples, below 1 for slow checks


SIDES = st.sampled_from([1, 2, 8, 28, 32, 33])
KINDS = {
    "options": Kind(bad_input.ANY_OPTIONS, make_config),
    "config.json": Kind(bad_input.CONFIG_JSON, read_config_json),
    "config files": Kind(bad_input.CONFIG_FILES | st.binary(max_size=50), run_config_file),
    "arguments": Kind(bad_input.ARGUMENTS, parse, 0.5),
    "embeddings": Kind(bad_input.EMBEDDINGS, load_embeddings),
    "results.json": Kind(bad_input.RESULTS, add_to_results),
    "metrics.jsonl": Kind(bad_input.METRICS, resume_metrics),
    "weights": Kind(st.tuples(bad_input.weight_files(*bad_input.weight_file()), st.booleans()), import_file, 0.1),
    "pictures": Kind(bad_input.PICTURES, decode),
    "schedules": Kind(st.tuples(bad_input.tiny_configs(), st.integers(1, 5)), schedule, 0.1),
    "evaluations": Kind(st.tuples(bad_input.SCALES, bad_input.tiny_configs()), measure, 0.03),
    "traced steps": Kind(st.tuples(bad_input.tiny_configs(), SIDES), trace, 0.01),
    "train steps": Kind(st.tuples(bad_input.tiny_configs(), SIDES), step, 0.002),
}


def tally(name: str, examples: int, folder: Path, derandomize: bool = False) -> collections.Counter[str]:
    """Numbers of inputs of a kind that worked and that were refused; raises any other error."""
    kind, counts = KINDS[name], collections.Counter[str]()

    @hypothesis.settings(SETTINGS, max_examples=max(1, round(kind.share * examples)), derandomize=derandomize)
    @hypothesis.given(kind.inputs)
    def attempt(example: Any) -> None:
        try:
            kind.attempt(example, folder)
            counts["worked"] += 1
        except UserError as error:
            if not re.fullmatch(r".{20,2000}\.", str(error)):
                raise AssertionError("The message is not one sentence.") from error
            counts["refused"] += 1

    attempt()
    return counts


def main(examples: int = 1000, kinds: tuple[str, ...] = tuple(KINDS)) -> None:
    """Tries random inputs.

    Args:
        examples: Number of inputs of each kind; a fraction of it for slow kinds.
        kinds: Kinds of input to try.
    """
    failed = 0
    print(f"{'kind':15} {'tried':>7} {'refused':>7} {'worked':>7} {'failed':>7}")
    for name in kinds:
        counts, failures = collections.Counter[str](), 0
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts = tally(name, examples, Path(folder))
            except Exception:
                traceback.print_exc()
                failures = 1
        print(f"{name:15} {sum(counts.values()):7} {counts['refused']:7} {counts['worked']:7} {failures:7}", flush=True)
        failed += failures
    raise SystemExit(min(failed, 1))


if __name__ == "__main__":
    tyro.cli(main)
