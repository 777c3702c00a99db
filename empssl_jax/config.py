"""Everything that can be chosen, each default once: frozen dataclasses, checked where they are made."""

import contextlib
import dataclasses
import json
import logging
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


class UserError(ValueError):
    """Something that the user can mend; its message is one sentence that says what is wrong and the remedy."""

    exit_code = 2


def require(condition: bool, option: str, value: object, remedy: str) -> None:
    """Raises UserError naming the option, its value and the remedy unless the condition holds."""
    if not condition:
        flag = "--" + option.replace("_", "-")
        raise UserError(f"{flag} is {value!r}: {remedy}.")


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes: from `low` to `high`, `low` itself left out if `above`."""

    low: float
    high: float
    whole: bool
    above: bool = False

    def holds(self, value: object) -> bool:
        """Whether the value is one of them."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.above else 'from'} {self.low:.10g} up to {self.high:.10g}"


class _Checked:
    """Checks the fields of a dataclass that have a range."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if "range" in field.metadata and not (value is None and field.default is None):
                allowed = field.metadata["range"]
                require(allowed.holds(value), field.name, value, f"give {allowed}")


def _whole(default: int | None, low: int, high: int = 1_000_000_000) -> Any:
    return dataclasses.field(default=default, metadata={"range": Range(low, high, whole=True)})


def _real(default: float, low: float, high: float = 1e9, *, above: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"range": Range(low, high, whole=False, above=above)})


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Which images."""

    dataset: str = "cifar10"
    """Name of a TFDS data set with square colour images, or "digits" (8x8 digits that scikit-learn contains)."""
    images_per_class: int | None = _whole(None, 1)
    """Keep only the first so many training images of each class, in the order of their ids."""
    test_images_per_class: int | None = _whole(None, 1)
    """Keep only the first so many test images of each class, in the order of their ids."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.dataset), "dataset", self.dataset, "give the name of a TFDS data set, or digits")


@dataclass(frozen=True)
class PatchConfig(_Checked):
    """How images become patches."""

    train_patches: int = _whole(20, 2)
    """Patches of each image in a training step."""
    patch_area: float = _real(0.25, 0.0, 1.0, above=True)
    """Area of a crop as a fraction of the image."""
    patch_size: int = _whole(32, 4)
    """Side in pixels that crops are resized to; 16 leaves the crops of 32x32 images as they are, at a quarter of the
    cost."""


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """The encoder."""

    width: int = _whole(64, 1)
    """Channels of the ResNet's first stage."""
    hidden_dim: int = _whole(4096, 1)
    """Dimension of the embeddings."""
    projection_dim: int = _whole(1024, 1)
    """Dimension of the projections, which the loss sees."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matrix products; auto is bfloat16 on GPU and TPU and float32 on CPU. Parameters,
    statistics and the loss are float32."""


@dataclass(frozen=True)
class TrainingConfig(_Checked):
    """The objective and its minimisation."""

    batch_size: int = _whole(100, 2)
    """Images in a step, over all devices."""
    max_epochs: int = _whole(1, 1)
    """Passes over the training images."""
    learning_rate: float = _real(0.3, 0.0, above=True)
    """Learning rate at its highest; it falls to 0 along a half cosine."""
    warmup_epochs: float = _real(0.0, 0.0)
    """Epochs in which the learning rate first rises linearly from 0."""
    weight_decay: float = _real(1e-4, 0.0)
    """L2 penalty on kernels."""
    momentum: float = _real(0.9, 0.0, 0.9999)
    """Decay of LARS's accumulated updates (Nesterov)."""
    trust_coefficient: float = _real(0.005, 0.0, above=True)
    """LARS's trust coefficient, eta."""
    invariance_coefficient: float = _real(200.0, 0.0)
    """Weight of the similarity of an image's patches, lambda."""
    coding_rate_eps: float = _real(0.2, 0.0, above=True)
    """Squared distortion of the coding rate, eps."""
    seed: int = _whole(42, 0)
    """Decides the initial parameters, the order of the images and their patches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = f"give less than --max-epochs, which is {self.max_epochs}"
        require(self.warmup_epochs < self.max_epochs, "warmup_epochs", self.warmup_epochs, remedy)


@dataclass(frozen=True)
class EvaluationConfig(_Checked):
    """Embeddings and how they are measured."""

    valid_patches: int = _whole(128, 0)
    """Random patches averaged into an embedding; 0 trains without measuring."""
    embedding_batch_size: int = _whole(250, 1)
    """Images embedded at a time, over all devices."""
    num_neighbours: int = _whole(20, 1)
    """Neighbours that vote in kNN."""
    temperature: float = _real(0.07, 0.0, above=True)
    """A neighbour of cosine similarity s has exp(s / temperature) votes."""
    linear_epochs: int = _whole(100, 0)
    """Epochs of the linear classifier; 0 leaves it out."""
    linear_learning_rate: float = _real(0.03, 0.0, above=True)
    """Its learning rate at the start, falling to 0 along a half cosine."""
    linear_weight_decay: float = _real(5e-5, 0.0)
    """Its L2 penalty."""
    linear_batch_size: int = _whole(100, 1)
    """Its batch size."""
    untrained: bool = False
    """Also measure kNN before training, after a few passes that set BatchNorm's statistics but learn nothing."""


@dataclass(frozen=True)
class RunConfig(_Checked):
    """Where a run lives; nothing here changes what is learned."""

    workdir: str = "runs/cifar10"
    """Folder of the run: checkpoints, metrics, embeddings, results. Training resumes where that folder left off."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    checkpoint_every: int | None = _whole(None, 1)
    """Save a checkpoint every so many steps, besides the end of each epoch."""
    max_to_keep: int = _whole(2, 1)
    """Newest checkpoints to keep, besides the one with the lowest loss."""
    remat: bool = False
    """Keep only the inputs of the residual blocks for the backward pass and compute the rest again: less memory, as
    for 200 patches an image, and more time."""
    profile: bool = False
    """Write a trace of steps 10 to 15 into profile/ of the workdir, for TensorBoard's profile plugin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.workdir), "workdir", self.workdir, "name a folder for the run")


_flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Config:
    """A training run."""

    data: Annotated[DataConfig, _flat] = dataclasses.field(default_factory=DataConfig)
    patches: Annotated[PatchConfig, _flat] = dataclasses.field(default_factory=PatchConfig)
    model: Annotated[ModelConfig, _flat] = dataclasses.field(default_factory=ModelConfig)
    training: Annotated[TrainingConfig, _flat] = dataclasses.field(default_factory=TrainingConfig)
    evaluation: Annotated[EvaluationConfig, _flat] = dataclasses.field(default_factory=EvaluationConfig)
    run: Annotated[RunConfig, _flat] = dataclasses.field(default_factory=RunConfig)


def training_differences(ours: Config, theirs: Config) -> list[str]:
    """What differs between two runs and changes what is learned, as "--option ours (was theirs)"."""
    differences = []
    for group in ("data", "patches", "model", "training"):
        for field in dataclasses.fields(getattr(ours, group)):
            mine, other = (getattr(getattr(config, group), field.name) for config in (ours, theirs))
            # The test images play no part in training.
            if mine != other and field.name != "test_images_per_class":
                differences.append(f"--{field.name.replace('_', '-')} {mine} (was {other})")
    return differences


def to_json(config: Config) -> str:
    """The config as JSON, one object a group."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: object) -> Config:
    """Reads `to_json`'s output back; raises UserError naming `source` if it is anything else."""
    try:
        groups = json.loads(text)
        types = {field.name: field.default_factory for field in dataclasses.fields(Config)}
        return Config(**{name: types[name](**values) for name, values in groups.items()})  # type: ignore[operator]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is not a config of this version of empssl_jax ({error}): train anew.") from error


def load_config(path: str | Path) -> Config:
    """Runs a Python file and returns what it calls `config`.

    Raises UserError if the file cannot be read or run, or has no such Config.
    """
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config {path} cannot be used ({type(error).__name__}: {error}).") from error
    if not isinstance(config, Config):
        raise UserError(f"--config {path} defines no `config = Config(...)`: see configs/cifar10.py.")
    return config


@dataclass(frozen=True)
class _ConfigOption:
    config: str


def parse_train_options(arguments: Sequence[str], default_config: Path) -> Config:
    """The config of `train.py [--config FILE] [options]`: the file's values, then those of the options."""
    chosen, rest = tyro.cli(
        _ConfigOption,
        args=list(arguments),
        default=_ConfigOption(str(default_config)),
        return_unknown_args=True,
        add_help=False,
    )
    description = (
        "Trains an EMP-SSL encoder and measures its embeddings.\n\n--config FILE chooses an experiment of configs/ "
        f"(now {chosen.config}), whose values are the defaults below. The same command again resumes the run."
    )
    return tyro.cli(Config, args=rest, default=load_config(chosen.config), description=description)


@contextlib.contextmanager
def user_errors_exit() -> Iterator[None]:
    """Turns a UserError into its message and an exit code, and Ctrl-C into exit code 130."""
    _silence_background_threads()
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _silence_background_threads() -> None:
    """Keeps traces of Orbax's and TensorStore's threads from the terminal: what concerns a run is raised in it too."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
