"""The options of every command but `train`, whose options are those of a run (options.py).

An empty line stands above the groups of options. Otherwise --help would show the last option's comment as their text.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from empssl_jax.config.checked_fields import Checked, float_field, int_field, path_field
from empssl_jax.config.errors import require
from empssl_jax.config.evaluation_options import EmbeddingConfig, EvaluationConfig, LabelConfig
from empssl_jax.config.options import FOLDER, DistributedConfig, RunConfig, TrainingConfig

RUN = "RUN"  # how help and errors name the folder of a run that is given without an option
FORMAT_OF_SUFFIX = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".onnx": "onnx"}
CheckpointChoice = int | Literal["latest", "best"]


@dataclass(frozen=True)
class MeasuredData(Checked):
    """The images to learn from and to measure on. Without any of these options, they are the run's."""

    # Another data set: a TFDS image data set by name, folder:PATH, or digits. Its results are kept apart from the run's
    # own. A folder with the images that the run was trained on is the run's own, wherever it is. The options below then
    # default to those of the run, otherwise to those of `empssl train`.
    dataset: str | None = path_field(None, after=FOLDER)
    # Split that classifiers learn from.
    train_split: str | None = None
    # Split that they are measured on.
    test_split: str | None = None
    # Side in pixels of the decoded images. Default: that of the images that the run was trained on.
    image_size: int | None = None
    # Refuse a folder with files that cannot be decoded.
    strict_images: bool = False
    # Number of images of each class to learn from, the first by id.
    images_per_class: int | None = None
    # Number of images of each class to measure on, the first by id.
    test_images_per_class: int | None = None


@dataclass(frozen=True)
class EvaluateOptions(Checked):
    """What to evaluate."""

    # Folder of a run. With several, such as runs/*, missing measurements are made and all are compared.
    workdir: str = path_field(RunConfig.workdir)
    # Checkpoint to restore: its step, the newest ("latest"), or the one with the lowest loss ("best").
    step: CheckpointChoice = "latest"
    # Folder with train.npz and test.npz to evaluate instead of a checkpoint.
    embeddings: str | None = path_field(None)
    # Folder of prepared TFDS data sets. Default: the run's, then $TFDS_DATA_DIR, then ~/tensorflow_datasets.
    data_dir: str | None = path_field(None)
    # Folder for decoded images. Default: the run's, then empssl_jax/images in the user's cache folder.
    cache_dir: str | None = path_field(None)

    data: OmitArgPrefixes[MeasuredData] = dataclasses.field(default_factory=MeasuredData)
    evaluation: OmitArgPrefixes[EvaluationConfig] = dataclasses.field(default_factory=EvaluationConfig)
    distributed: OmitArgPrefixes[DistributedConfig] = dataclasses.field(default_factory=DistributedConfig)


@dataclass(frozen=True)
class CompareOptions(EvaluateOptions):
    """Which runs to compare, and how to measure them."""

    # Folders of runs, such as runs/*. Those without a config.json are skipped.
    runs: Annotated[
        Positional[tuple[str, ...]], arg(metavar=f"{RUN} [{RUN} ...]", help_behavior_hint="(required)")
    ] = ()
    workdir: Suppress[str] = path_field(RunConfig.workdir)  # one of them
    embeddings: Suppress[str | None] = None


@dataclass(frozen=True)
class EmbedOptions(Checked):
    """What to embed, and with which encoder."""

    # One image file, or a folder of them, subfolders included.
    images: str = path_field()
    # Folder of a run; or cifar10-small, an encoder that comes with the package.
    workdir: str = path_field(RunConfig.workdir)
    # File to write: `embeddings` (N, E) float32; `files`, their N names relative to the folder; and `unreadable`, the
    # names of files that were skipped.
    output: str = path_field("embeddings.npz")
    # Checkpoint to use: its step, the newest ("latest"), or the one with the lowest loss ("best").
    step: CheckpointChoice = "latest"
    # Images embedded at a time, over all devices. Default: 250 on CPU, 1,000 for each GPU or TPU.
    embedding_batch_size: int | None = int_field(EvaluationConfig.embedding_batch_size, 1, 100_000)

    embedding: OmitArgPrefixes[EmbeddingConfig] = dataclasses.field(default_factory=EmbeddingConfig)


@dataclass(frozen=True)
class ExportOptions(Checked):
    """What to export, and where to."""

    # Folder of a run.
    run: Annotated[Positional[str], arg(metavar=RUN)] = path_field()
    # The weights, as a .safetensors file or for torch.load, which needs PyTorch; or onnx, a program that embeds images
    # without this package.
    format: Literal["safetensors", "torch", "onnx"] = "safetensors"
    # Checkpoint to export: its step, the newest ("latest"), or the one with the lowest loss ("best").
    step: CheckpointChoice = "latest"
    # File to write. Default: weights.safetensors, weights.pt or embedder.onnx in the run's folder.
    output: str | None = path_field(None)
    # For --format onnx only.
    embedding: OmitArgPrefixes[EmbeddingConfig] = dataclasses.field(default_factory=EmbeddingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        named = FORMAT_OF_SUFFIX.get(Path(self.output or "").suffix.lower(), self.format)
        remedy = f"that suffix belongs to --format {named}, so give that format or another name"
        require(named == self.format, "output", self.output, remedy)


@dataclass(frozen=True)
class ImportOptions(Checked):
    """Which weights to import, and where to."""

    # A .safetensors file, or one of torch.save (.pt, .pth), which needs PyTorch; or cifar10-small, an encoder that
    # comes with the package.
    file: Annotated[Positional[str], arg(metavar="FILE")] = path_field()
    # Folder of the new run.
    workdir: str = path_field()
    # Python file with the rest of the run's config, such as configs/cifar10.py. Default: what the exported run had, or
    # else the defaults. The encoder's sizes and the normalisation of its input do not come from it.
    config: str | None = path_field(None)
    # The file holds a ResNet without heads, such as torchvision's. Its classifier is dropped; both heads are drawn
    # with the config's dimensions and seed.
    fresh_heads: bool = False
    # Mean of red, green and blue, from 0 to 1, that the weights were trained with. Default: that in the file; or else
    # the authors', 0.5, if the file has their heads, and ImageNet's if not.
    input_mean: tuple[float, float, float] | None = None
    # Standard deviation of red, green and blue that the weights were trained with, with similar defaults.
    input_std: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class ReportOptions(Checked):
    """Which run to report on."""

    # Folder of a run.
    run: Annotated[Positional[str], arg(metavar=RUN)] = path_field()
    # Where the run's images are now, as folder:PATH, if they have moved.
    dataset: str | None = path_field(None, after=FOLDER)
    # Folder of prepared TFDS data sets. Default: the run's, then $TFDS_DATA_DIR, then ~/tensorflow_datasets.
    data_dir: str | None = path_field(None)


@dataclass(frozen=True)
class FinetuneOptions(Checked):
    """Which encoder to fine-tune, and how."""

    # Folder of a run.
    run: Annotated[Positional[str], arg(metavar=RUN)] = path_field()
    # New folder for the fine-tuned weights, the options and the results. Default: a folder in the run's that is named
    # after --label-fraction, such as RUN/finetuned-0.01.
    output: str | None = path_field(None)
    # Checkpoint to start from: its step, the newest ("latest"), or the one with the lowest loss ("best").
    step: CheckpointChoice = "latest"
    # Passes over the labelled training images.
    max_epochs: int = int_field(30, 1, 100_000)
    # Images in a step, over all devices; all of them if there are fewer.
    batch_size: int = int_field(50, 2, 100_000)
    # Images embedded at a time, over all devices. Default: as in the run's evaluation.
    embedding_batch_size: int | None = int_field(None, 1, 100_000)
    # Initial learning rate of the encoder (AdamW); it decays to 0 along a half cosine.
    learning_rate: float = float_field(1e-3, 1e-9)
    # Initial learning rate of the classifier, which starts as a logistic regression on the run's embeddings.
    classifier_learning_rate: float = float_field(1e-4, 1e-9)
    # Weight decay of kernels: a step multiplies them by 1 minus this times the learning rate.
    weight_decay: float = float_field(1e-2, 0.0)
    # Area of the random crops, which are mirrored at random, as a fraction of the image. Test images are not cropped.
    # Both are at the scale of the run's patches.
    crop_area: float = float_field(0.6, 1e-9, 1.0)
    # Also jitter the colours of crops, blur and solarize them, as in EMP-SSL's training.
    colours: bool = False
    # Seed of the order of the images, their crops, and the choice of those that are held out.
    seed: int = int_field(TrainingConfig.seed, 0)
    # Folder of prepared TFDS data sets. Default: the run's, then $TFDS_DATA_DIR, then ~/tensorflow_datasets.
    data_dir: str | None = path_field(None)
    # Folder for decoded images. Default: the run's, then empssl_jax/images in the user's cache folder.
    cache_dir: str | None = path_field(None)

    labels: OmitArgPrefixes[LabelConfig] = dataclasses.field(default_factory=LabelConfig)
    data: OmitArgPrefixes[MeasuredData] = dataclasses.field(default_factory=MeasuredData)
