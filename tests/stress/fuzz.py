"""Whatever a user hands over works or is refused with a sentence: random input of every kind, and what comes of it.

    python -m tests.stress.fuzz --examples 10000

prints for each kind how many inputs were tried, refused with a sentence, worked and failed; the last must be 0.
tests/test_bad_input.py tries a few of each.
"""

import collections
import contextlib
import dataclasses
import io
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from hypothesis import strategies as st

from empssl_jax.config import Config
from empssl_jax.config.config_files import parse_train_options, read_config_file
from empssl_jax.config.errors import UserError
from empssl_jax.data import decoding
from empssl_jax.data.batches import Batch
from empssl_jax.evaluation import embedding_files, embeddings
from empssl_jax.evaluation.evaluate import measure_knn, measure_linear
from empssl_jax.method import losses
from empssl_jax.method.train_step import create_state, learning_rate_schedule, make_optimizer, make_train_step
from empssl_jax.run_folder import saved_config
from empssl_jax.run_folder import step_files as json_lines
from empssl_jax.run_folder.results import add_results, load_results
from empssl_jax.runtime.devices import device_mesh
from tests.stress import bad_input
from tests.stress.bad_input import FLAGS, GROUPS, OPTIONS

REPOSITORY = Path(__file__).parents[2]


def make_config(groups: dict[str, Any], folder: Path) -> None:
    """A config is refused by the name of an option, or survives its way to JSON and back."""
    try:
        made = Config(
            **{k: GROUPS[k](**v) if isinstance(v, dict) and set(v) <= set(OPTIONS[k]) else v for k, v in groups.items()}
        )
    except UserError as error:
        if str(error).split(" is ")[0] not in set(FLAGS) | {f"Config's {name}" for name in GROUPS}:
            raise AssertionError("This names no option.") from error
        raise
    assert saved_config.from_json(saved_config.to_json(made), "config.json") == made


def read_config_json(content: bytes, folder: Path) -> None:
    """A config.json is refused or gives a config."""
    assert isinstance(saved_config.from_json(content, folder / "config.json"), Config)


def run_config_file(content: bytes, folder: Path) -> None:
    """A config file is refused or gives a config."""
    path = folder / "config.py"
    path.write_bytes(content)
    assert isinstance(read_config_file(str(path)), Config)


def parse(arguments: list[str], folder: Path) -> None:
    """The command line is refused with a message and exit code 2, or gives a config or its help."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            parsed = parse_train_options(["--config", "digits", *arguments])
        assert isinstance(parsed, Config)
    except SystemExit as error:
        assert shown.getvalue()
        if error.code not in (0, 2):
            raise AssertionError("This is another exit code.") from error
        if error.code == 2:
            raise UserError("The command line was refused.") from error


def load_embeddings(content: bytes, folder: Path) -> None:
    """Embeddings are refused or finite, each with a class below their number or with -1 for none."""
    path = folder / "test.npz"
    path.write_bytes(content)
    loaded = embedding_files.load_embeddings(path)
    assert loaded.embeddings.dtype == np.float32
    assert len(loaded.embeddings) == len(loaded.labels) > 0
    assert np.isfinite(np.linalg.norm(loaded.embeddings, axis=1)).all()
    assert -1 <= loaded.labels.min() <= loaded.labels.max() < loaded.num_classes <= embedding_files.MAX_CLASSES


def add_to_results(content: bytes, folder: Path) -> None:
    """Results are refused, or what they hold is still there after others are added."""
    path = folder / "results.json"
    path.write_bytes(content)
    before = load_results(folder)
    after = add_results(folder, {"new": {"top1": 0.5, "top5": 1.0}})
    assert repr(after | before) == repr(load_results(folder) | before)
    assert before.keys() <= after.keys()


def resume_metrics(lines: list[tuple[int | None, bytes]], folder: Path) -> None:
    """Of metrics.jsonl exactly the lines of the steps before the resumption are kept."""
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(line for _, line in lines))
    json_lines.drop_steps_from(path, 5)
    assert path.read_bytes() == b"".join(line + b"\n" for step, line in lines if step is not None and step < 5)


def decode(content: bytes, folder: Path) -> None:
    """A picture is refused or gives RGB pixels."""
    try:
        image = decoding.decode(content, None)
    except decoding.UnreadableError as error:
        raise UserError(f"The picture is refused: {error}.") from error
    assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


def prepare(made: Config, steps_per_epoch: int = 2):
    """The optimizer and the train step of a config, on one device."""
    schedule = learning_rate_schedule(made.training, steps_per_epoch)
    optimizer = make_optimizer(made.training, schedule)
    return optimizer, make_train_step(made, optimizer, schedule, steps_per_epoch, device_mesh(1))


def batch_of(made: Config, side: int) -> Batch:
    """Images of noise."""
    size = made.training.batch_size
    images = np.random.RandomState(0).randint(0, 256, (size, side, side, 3)).astype(np.uint8)
    return Batch(images, np.arange(size, dtype=np.int32))


def resolved(made: Config) -> Config:
    """The config with its precision named."""
    precision = "float32" if made.model.precision == "auto" else made.model.precision
    return dataclasses.replace(made, model=dataclasses.replace(made.model, precision=precision))


def trace(example: tuple[Config, int], folder: Path) -> None:
    """The train step can be traced, and gives a state like the one before; so can embeddings."""
    made, side = resolved(example[0]), example[1]
    optimizer, step = prepare(made)
    state, batch = jax.eval_shape(lambda: create_state(made, optimizer)), batch_of(made, side)
    after, _ = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    embedded = jax.eval_shape(embeddings.make_embed(made, device_mesh(1)), state.encoder, *batch)
    assert embedded.shape == (made.training.batch_size, embeddings.embedding_dim(made))


def step(example: tuple[Config, int], folder: Path) -> None:
    """A train step has a finite loss, similarity at most 1 and a coding rate within its bounds."""
    made, side = resolved(example[0]), example[1]
    optimizer, train_step = prepare(made)
    _, measured = train_step(create_state(made, optimizer), batch_of(made, side))
    values = {name: float(value) for name, value in measured.items()}
    assert np.isfinite(list(values.values())).all(), values
    bounds = losses.coding_rate_bounds(
        made.training.batch_size, made.model.projection_dim, made.training.coding_rate_eps
    )
    assert bounds[0] < bounds[1]
    assert bounds[0] - 1e-3 <= values["coding_rate"] <= bounds[1] + 1e-3 * max(1, bounds[1])
    assert values["similarity"] <= 1 + 1e-5


def schedule(example: tuple[Config, int], folder: Path) -> None:
    """The learning rate is finite, from 0 to its highest, in every step."""
    made, steps_per_epoch = example
    rates = jax.vmap(learning_rate_schedule(made.training, steps_per_epoch))(jnp.arange(15))
    rates = rates[: steps_per_epoch * made.training.max_epochs]
    assert np.isfinite(rates).all()
    assert 0 <= min(rates) <= max(rates) <= made.training.learning_rate * (1 + 1e-6)


def measure(example: tuple[float, Config], folder: Path) -> None:
    """Accuracies are fractions, of embeddings of any size, or the classifier is said to have diverged."""
    scale, made = example
    random, names = np.random.RandomState(0), ("a", "b", "c")
    labelled = [
        embeddings.LabelledEmbeddings(
            np.float32(scale * random.standard_normal((7, 3))), random.randint(0, 3, 7).astype(np.int32), names
        )
        for _ in range(2)
    ]
    both = dict(zip(("train", "test"), labelled, strict=True))
    accuracies = [measure_knn(both, made.evaluation, device_mesh())]
    if made.evaluation.linear_epochs > 0:
        accuracies += measure_linear(both, made.evaluation, made.training.seed, device_mesh()).values()
    for accuracy in accuracies:
        assert 0 <= accuracy["top1"] <= accuracy["top5"] <= 1


class Kind(NamedTuple):
    """A kind of input and what is done with it, which raises UserError, succeeds, or fails the test."""

    inputs: st.SearchStrategy
    attempt: Callable[[Any, Path], None]
    share: float = 1.0  # of the examples asked for: some take long


SIDES = st.sampled_from([1, 2, 8, 28, 32, 33])
KINDS = {
    "options": Kind(bad_input.ANY_OPTIONS, make_config),
    "config.json": Kind(bad_input.CONFIG_JSON, read_config_json),
    "config files": Kind(bad_input.CONFIG_FILES | st.binary(max_size=50), run_config_file),
    "arguments": Kind(bad_input.ARGUMENTS, parse, 0.5),
    "embeddings": Kind(bad_input.EMBEDDINGS, load_embeddings),
    "results.json": Kind(bad_input.RESULTS, add_to_results),
    "metrics.jsonl": Kind(bad_input.METRICS, resume_metrics),
    "pictures": Kind(bad_input.PICTURES, decode),
    "schedules": Kind(st.tuples(bad_input.tiny_configs(), st.integers(1, 5)), schedule, 0.1),
    "evaluations": Kind(st.tuples(bad_input.SCALES, bad_input.tiny_configs()), measure, 0.03),
    "traced steps": Kind(st.tuples(bad_input.tiny_configs(), SIDES), trace, 0.01),
    "train steps": Kind(st.tuples(bad_input.tiny_configs(), SIDES), step, 0.002),
}


def tally(name: str, examples: int, folder: Path, derandomize: bool = False) -> collections.Counter[str]:
    """How many inputs of a kind worked and how many were refused; raises what anything else of them raised."""
    kind, counts = KINDS[name], collections.Counter[str]()

    @hypothesis.settings(
        max_examples=max(1, round(kind.share * examples)),
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(kind.inputs)
    def attempt(example):
        try:
            kind.attempt(example, folder)
            counts["worked"] += 1
        except UserError as error:
            if not re.fullmatch(r".{20,2000}\.", str(error)):
                raise AssertionError("This is no sentence.") from error
            counts["refused"] += 1

    attempt()
    return counts


def main(examples: int = 1000, kinds: tuple[str, ...] = tuple(KINDS)) -> None:
    """Tries random inputs.

    Args:
        examples: inputs of each kind; of those that compile, a share.
        kinds: which.
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
