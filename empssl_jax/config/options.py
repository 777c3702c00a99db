"""Everything that can be chosen, each default once: frozen dataclasses, checked where they are made.

The highest sizes are far above what memory holds, and low enough that their products fit into XLA's integers, so that
too large a model or batch is told as being out of memory.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from empssl_jax.config.errors import Checked, UserError, flag, one_line, real, require, whole


@dataclass(frozen=True)
class DataConfig(Checked):
    """Which images."""

    dataset: str = "cifar10"
    """Name of a TFDS data set of images; or folder:PATH, a folder of image files (JPEG, PNG, ...), as docs/data.md
    describes; or digits, the 8x8 digits that scikit-learn contains."""
    train_split: str = "train"
    """Split that is trained on; labels play no part in it. kNN and the linear classifier learn from the labelled
    images of this split, or if it has none (as stl10's unlabelled) from those of the split train."""
    test_split: str | None = None
    """Split that kNN and the linear classifier are measured on; by default test, or else validation. Images without
    labels are embedded but left out of both measures."""
    image_size: int | None = whole(None, 1, 4096)
    """Side in pixels that images are brought to when they are decoded: the largest square in their centre is resized.
    By default they stay as they are, and must be square and alike."""
    strict_images: bool = False
    """Refuse a folder with files that cannot be decoded, in place of listing them and leaving them out."""
    images_per_class: int | None = whole(None, 1)
    """Keep only the first so many training images of each class, in the order of their ids; none without a label."""
    test_images_per_class: int | None = whole(None, 1)
    """Keep only the first so many test images of each class, in the order of their ids."""

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "give another split than --train-split, or accuracies would be those of images that were trained on"
        require(self.test_split != self.train_split, "test_split", self.test_split, remedy)


@dataclass(frozen=True)
class PatchConfig(Checked):
    """How images become patches."""

    train_patches: int = whole(20, 2, 1000)
    """Patches of each image in a training step."""
    patch_area: float = real(0.25, 1e-9, 1.0)
    """Area of a crop as a fraction of the image."""
    patch_size: int = whole(32, 4, 1024)
    """Side in pixels that crops are resized to; 16 leaves the crops of 32x32 images as they are, at a quarter of the
    cost."""
    patch_aspect: float = real(1.0, 1.0, 100.0)
    """Highest ratio of the two sides of a crop, which is drawn anew for each; 1 keeps crops square. torchvision's
    RandomResizedCrop, and so the paper's recipe for ImageNet, has 4/3."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resized; the paper's recipe for ImageNet has bicubic."""

    @property
    def crops(self) -> dict[str, Any]:
        """How crops are made, as keyword arguments of `patches.multi_patch`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "train_patches"}


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The encoder."""

    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    """The ResNet: two convolutions a block and 8 or 16 blocks, or three a block and 16 blocks."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """How the ResNet begins: with a 3x3 convolution, for patches of about 32 pixels; or with a 7x7 convolution and
    pooling that quarter the side, for larger ones."""
    width: int = whole(64, 1, 1000)
    """Channels of the stem; the ResNet's size goes with it."""
    hidden_dim: int = whole(4096, 1, 1_000_000)
    """Dimension of the embeddings."""
    projection_dim: int = whole(1024, 2, 1_000_000)
    """Dimension of the projections, which the loss sees."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matrix products; auto is bfloat16 on GPU and TPU and float32 on CPU. Parameters,
    statistics and the loss are float32."""


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """The objective and its minimisation."""

    batch_size: int = whole(100, 2, 100_000)
    """Images in a step, over all devices."""
    max_epochs: int = whole(1, 1, 100_000)
    """Passes over the training images."""
    learning_rate: float = real(0.3, 1e-9)
    """Learning rate at its highest; it falls to 0 along a half cosine."""
    warmup_epochs: float = real(0.0, 0.0)
    """Epochs in which the learning rate first rises linearly."""
    weight_decay: float = real(1e-4, 0.0)
    """L2 penalty on kernels."""
    momentum: float = real(0.9, 0.0, 0.9999)
    """Decay of LARS's accumulated updates (Nesterov)."""
    trust_coefficient: float = real(0.005, 1e-9)
    """LARS's trust coefficient, eta."""
    invariance_coefficient: float = real(200.0, 0.0)
    """Weight of the similarity of an image's patches, lambda."""
    coding_rate_eps: float = real(0.2, 1e-9, 1000.0)
    """Squared distortion of the coding rate, eps."""
    seed: int = whole(42, 0)
    """Decides the initial parameters, the order of the images and their patches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = f"give less than --max-epochs, which is {self.max_epochs}"
        require(self.warmup_epochs < self.max_epochs, "warmup_epochs", self.warmup_epochs, remedy)


@dataclass(frozen=True)
class EmbeddingConfig(Checked):
    """How an image is embedded."""

    valid_patches: int = whole(128, 0, 1_000_000)
    """Patches averaged into an embedding; 0 leaves embeddings, and so all measures, out."""
    valid_crops: Literal["random", "grid"] = "random"
    """What these patches are: random ones, made as in training and as in the paper; or the crops of a regular grid in
    their own colours, of which fewer are enough and which measure better (docs/recipe.md)."""
    embedded_layer: Literal["hidden", "stages"] = "hidden"
    """What is averaged over the patches: hidden features, as in the paper; or the mean of each stage's map in the
    backbone, the four side by side, which is shorter and measures better (docs/recipe.md)."""
    cells: int = whole(1, 1, 10)
    """Cells along each side of the image. Each cell averages its own patches of the grid, and the embedding is the
    cells' means side by side, so that it knows what was where; 1 averages all, as in the paper."""
    embedding_batch_size: int = whole(250, 1, 100_000)
    """Images embedded at a time, over all devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid_crops == "random":
            require(self.cells == 1, "cells", self.cells, "random crops lie in no cell, give --valid-crops grid")
            return
        side = self.grid_side
        remedy = "a grid has a square number of crops, as 16"
        require(side**2 == self.valid_patches, "valid_patches", self.valid_patches, remedy)
        remedy = f"the cells must share out the grid's {side} crops a side, give a divisor of {side}"
        require(side % self.cells == 0, "cells", self.cells, remedy)

    @property
    def grid_side(self) -> int:
        """Crops along each side of a grid of `valid_patches`."""
        return math.isqrt(self.valid_patches)


@dataclass(frozen=True)
class EvaluationConfig(EmbeddingConfig):
    """Embeddings and how they are measured."""

    whiten: bool = False
    """Whiten the embeddings before kNN, by mean and covariance of the training images'."""
    num_neighbours: int = whole(20, 1)
    """Neighbours that vote in kNN."""
    temperature: float = real(0.07, 0.02)
    """A neighbour of cosine similarity s has exp(s / temperature) votes."""
    linear_epochs: int = whole(100, 0, 100_000)
    """Epochs of the linear classifier; 0 leaves it out."""
    linear_learning_rate: float = real(0.03, 1e-9)
    """Its learning rate at the start, falling to 0 along a half cosine."""
    linear_weight_decay: float = real(5e-5, 0.0)
    """Its L2 penalty."""
    linear_batch_size: int = whole(100, 1)
    """Its batch size."""
    untrained: bool = False
    """Also measure kNN before training, after a few passes that set BatchNorm's statistics but learn nothing."""
    report: bool = True
    """Write report.html, a page of figures and explanations, at the end."""

    @property
    def embeddings(self) -> str:
        """In words, how the embeddings are made that are measured."""
        parts = [f"{self.valid_patches} {self.valid_crops} patches", self.embedded_layer]
        parts += [f"{self.cells}x{self.cells} cells"] * (self.cells > 1) + ["whitened for kNN"] * self.whiten
        return ", ".join(parts)


@dataclass(frozen=True)
class RunConfig(Checked):
    """Where a run lives; nothing here changes what is learned."""

    workdir: str = "runs/cifar10"
    """Folder of the run: checkpoints, metrics, embeddings, results. Training resumes where that folder left off."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    cache_dir: str | None = None
    """Folder for the decoded images of folders and of large data sets, which need not fit into memory; by default
    empssl_jax/images of the user's cache folder."""
    checkpoint_every: int | None = whole(None, 1)
    """Save a checkpoint every so many steps, besides the end of each epoch."""
    max_to_keep: int = whole(2, 1)
    """Newest checkpoints to keep, besides the one with the lowest loss."""
    remat: bool = False
    """Keep only the inputs of the residual blocks for the backward pass and compute the rest again: less memory, as
    for 200 patches an image, and more time."""
    profile: bool = False
    """Write a trace of steps 10 to 15 into profile/ of the workdir, for TensorBoard's profile plugin."""
    probe_every: int | None = whole(None, 1)
    """Measure kNN on a few of the images every so many steps and at the end, into probe.jsonl with the seconds of
    training; training itself is the same to the bit."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the extra of that name)."""


@dataclass(frozen=True)
class DistributedConfig(Checked):
    """The processes that work as one; no part of the run, which other processes may resume."""

    coordinator: str | None = None
    """Where the processes meet: HOST:PORT, a host and a free port of process 0. Goes with --num-processes and
    --process-id; TPU pods, SLURM and other clusters that JAX recognises need none of the three."""
    num_processes: int | None = whole(None, 1)
    """How many processes there are; 1 runs alone, also where JAX recognises a cluster."""
    process_id: int | None = whole(None, 0)
    """Number of this process, from 0."""
    heartbeat_timeout: int = whole(100, 5)
    """Seconds after which the processes give up one that has ended or been stopped, and end too."""
    step_timeout: int = whole(600, 1)
    """Seconds after which the processes end if no training step is done, as when one of them hangs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coordinator is None:
            remedy = "give --coordinator, --num-processes and --process-id together"
            require(self.num_processes in (None, 1), "num_processes", self.num_processes, remedy)
            require(self.process_id is None, "process_id", self.process_id, remedy)
            return
        host, _, port = self.coordinator.rpartition(":")
        remedy = "give HOST:PORT, a host and a free port of process 0, as 10.0.0.1:1234"
        require(bool(host) and port.isdecimal() and 0 < int(port) < 2**16, "coordinator", self.coordinator, remedy)
        remedy = "give --num-processes and --process-id with it"
        require(None not in (self.num_processes, self.process_id), "coordinator", self.coordinator, remedy)
        remedy = f"with --num-processes {self.num_processes}, the processes are numbered from 0 to one less"
        require(self.process_id < self.num_processes, "process_id", self.process_id, remedy)  # type: ignore[operator]


NO_PART_IN_TRAINING = ("test_split", "test_images_per_class", "strict_images")

# The loss's matrices have eigenvalues from 1 to dimension / eps: above 1e6 float32 can lose what keeps them positive.
SMALLEST_EPS = 1e-5  # of the dimension

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
    distributed: Annotated[DistributedConfig, _flat] = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            group, kind = getattr(self, field.name), field.default_factory
            if not isinstance(group, kind):  # type: ignore[arg-type]
                name = kind.__name__  # type: ignore[union-attr]
                raise UserError(f"Config's {field.name} is {one_line(group)}: give {name}(...).")
        smallest = self.model.projection_dim * SMALLEST_EPS
        remedy = f"give at least {smallest:.3g}, since float32 computes no smaller one at --projection-dim "
        remedy += str(self.model.projection_dim)
        require(self.training.coding_rate_eps >= smallest, "coding_rate_eps", self.training.coding_rate_eps, remedy)


def training_differences(ours: Config, theirs: Config) -> list[str]:
    """What differs between two runs and changes what is learned, as "--option ours (was theirs)"."""
    differences = []
    for group in ("data", "patches", "model", "training"):
        for field in dataclasses.fields(getattr(ours, group)):
            mine, other = (getattr(getattr(config, group), field.name) for config in (ours, theirs))
            if mine != other and field.name not in NO_PART_IN_TRAINING:
                differences.append(f"{flag(field.name)} {mine} (was {other})")
    return differences
