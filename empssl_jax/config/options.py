"""Every option of a training run and its only default: frozen dataclasses, checked where they are made.

The comment above a field is its text in --help. The upper limits of sizes are far above what any memory holds, and low
enough that their products fit into XLA's integers: a model or batch that is too large is reported as out of memory.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from empssl_jax.config.checked_fields import Checked, channels_field, float_field, int_field, path_field
from empssl_jax.config.errors import UserError, require

BackboneName = Literal["resnet18", "resnet34", "resnet50"]
TRAIN = "train"  # the default training split
FOLDER = "folder:"  # before the path of a folder of image files


@dataclass(frozen=True)
class DataConfig(Checked):
    """The images."""

    # A TFDS image data set by name; or folder:PATH, a folder of image files (JPEG, PNG, ...), see docs/data.md; or
    # digits, the 8x8 digits of scikit-learn.
    dataset: str = path_field("cifar10", after=FOLDER)
    # Split to train on; its labels are not used. Default: train. kNN and the linear classifier learn from the labelled
    # images of this split, or of the split train if this one has no labels (such as stl10's unlabelled). For a folder:
    # a subfolder, or "." to take all of its subfolders as classes.
    train_split: str | None = None
    # Split to measure kNN and the linear classifier on. Default: test, or else validation. Images without labels are
    # embedded but not measured.
    test_split: str | None = None
    # Side in pixels of the decoded images: the largest central square is resized to it. Default: images keep their
    # size, and must all be squares of one size.
    image_size: int | None = int_field(None, 1, 4096)
    # Refuse a folder with files that cannot be decoded, instead of listing and skipping them.
    strict_images: bool = False
    # Number of training images to keep of each class, the first by id. Images without a label are left out.
    images_per_class: int | None = int_field(None, 1)
    # Number of test images to keep of each class, the first by id.
    test_images_per_class: int | None = int_field(None, 1)

    @property
    def folder(self) -> Path | None:
        """The folder of image files that `dataset` names; None for other data sets."""
        return Path(self.dataset.removeprefix(FOLDER)) if self.dataset.startswith(FOLDER) else None

    def with_absolute_folder(self) -> "DataConfig":
        """The same with an absolute path of the folder, which holds whatever the current folder is."""
        if self.dataset == FOLDER or self.folder is None:
            return self
        try:
            return dataclasses.replace(self, dataset=f"{FOLDER}{self.folder.absolute()}")
        except UserError:  # the current folder's name is too long, or cannot be saved in a config
            return self

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "give a split other than --train-split, or accuracies would be measured on training images"
        require(self.test_split != (self.train_split or TRAIN), "test_split", self.test_split, remedy)


@dataclass(frozen=True)
class PatchConfig(Checked):
    """How images become patches."""

    # Patches of each image in a training step.
    train_patches: int = int_field(20, 2, 1000)
    # Area of a crop as a fraction of the image.
    patch_area: float = float_field(0.25, 1e-9, 1.0)
    # Side in pixels that crops are resized to. 16 keeps the crops of 32x32 images at their size, with a quarter of the
    # arithmetic. On a GPU, a training step then takes a third of the time.
    patch_size: int = int_field(32, 4, 1024)
    # Highest ratio of a crop's sides, drawn for each crop; 1 keeps crops square. The paper's ImageNet recipe uses 4/3,
    # the default of torchvision's RandomResizedCrop.
    patch_aspect: float = float_field(1.0, 1.0, 100.0)
    # How crops are resized. The paper's ImageNet recipe uses bicubic.
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @property
    def crops(self) -> dict[str, Any]:
        """How crops are made, as keyword arguments of `patches.multi_patch`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "train_patches"}


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The encoder."""

    # The ResNet. 18 and 34 have two convolutions a block, in 8 and 16 blocks; 50 has three, in 16 blocks.
    backbone: BackboneName = "resnet18"
    # First layers of the ResNet: cifar is a 3x3 convolution, for patches of about 32 pixels; imagenet is a 7x7
    # convolution and pooling, which reduce the side to a quarter, for larger patches.
    stem: Literal["cifar", "imagenet"] = "cifar"
    # Channels of the stem. All channels of the ResNet scale with it.
    width: int = int_field(64, 1, 1000)
    # Dimension of the hidden features, the paper's embeddings.
    hidden_dim: int = int_field(4096, 1, 1_000_000)
    # Dimension of the projections, which the loss is computed from.
    projection_dim: int = int_field(1024, 2, 1_000_000)
    # Type of activations and matrix products; auto is bfloat16 on GPU and TPU and float32 on CPU. Parameters,
    # statistics and the loss are always float32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Mean of red, green and blue, from 0 to 1, that the encoder subtracts from its input. Weights that were trained
    # elsewhere need the mean and standard deviation that they were trained with.
    input_mean: tuple[float, float, float] = channels_field((0.5, 0.5, 0.5), 0.0, 1.0)
    # Standard deviation of red, green and blue that the encoder then divides by.
    input_std: tuple[float, float, float] = channels_field((0.5, 0.5, 0.5), 0.001, 1.0)


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """The objective and the optimizer."""

    # Images in a step, over all devices.
    batch_size: int = int_field(100, 2, 100_000)
    # Number of pieces in which a step's patches are embedded, one after the other: less memory, a third more work. On
    # CPU, compiling takes longer with each piece, and more than about five save nothing. Each piece has all images and
    # an equal share of --train-patches. The loss is that of the whole batch, but BatchNorm uses the statistics of each
    # piece.
    accumulate: int = int_field(1, 1, 1000)
    # Passes over the training images.
    max_epochs: int = int_field(1, 1, 100_000)
    # Peak learning rate.
    learning_rate: float = float_field(0.3, 1e-9)
    # How the learning rate decays to 0: along a half cosine, as published, or linearly.
    schedule: Literal["cosine", "linear"] = "cosine"
    # Epochs of linear warm-up of the learning rate.
    warmup_epochs: float = float_field(0.0, 0.0)
    # L2 penalty on kernels.
    weight_decay: float = float_field(1e-4, 0.0)
    # Decay of LARS's accumulated updates (Nesterov momentum).
    momentum: float = float_field(0.9, 0.0, 0.9999)
    # LARS's trust coefficient, eta.
    trust_coefficient: float = float_field(0.005, 1e-9)
    # Weight of the similarity of an image's patches, lambda.
    invariance_coefficient: float = float_field(200.0, 0.0)
    # Squared distortion of the coding rate, eps.
    coding_rate_eps: float = float_field(0.2, 1e-9, 1000.0)
    # Seed of the initial parameters, the order of the images and their patches.
    seed: int = int_field(42, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = f"give less than --max-epochs, which is {self.max_epochs}"
        require(self.warmup_epochs < self.max_epochs, "warmup_epochs", self.warmup_epochs, remedy)


@dataclass(frozen=True)
class RunConfig(Checked):
    """Where the run is stored and how it executes. Nothing here changes what is learned."""

    # Folder of the run: checkpoints, metrics, embeddings, results. Training resumes from what it holds.
    workdir: str = path_field("runs/cifar10")
    # Folder of prepared TFDS data sets. Default: $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
    data_dir: str | None = path_field(None)
    # Folder for decoded images, which need not fit into memory. Default: empssl_jax/images in the user's cache folder.
    cache_dir: str | None = path_field(None)
    # Steps between checkpoints. Default: one at the end of each epoch. The last step is always saved.
    checkpoint_every: int | None = int_field(None, 1)
    # Newest checkpoints to keep, besides the one with the lowest loss.
    max_to_keep: int = int_field(2, 1)
    # Recompute the activations inside residual blocks in the backward pass. Takes less memory and more time, for
    # example with 200 patches per image.
    remat: bool = False
    # Write a trace of steps 10 to 15 into profile/ of the workdir, for TensorBoard's profile plugin.
    profile: bool = False
    # Steps between measurements of kNN and the effective rank on a few of the images, also made at the end. Writes them
    # with the seconds of training to probe.jsonl. Training stays bit-identical.
    probe_every: int | None = int_field(None, 1)
    # Also log to Weights & Biases (needs the extra of that name).
    wandb: bool = False

    def with_absolute_folders(self) -> "RunConfig":
        """The same with absolute paths of the folders of data, which hold whatever the current folder is."""
        try:
            return dataclasses.replace(self, data_dir=_absolute(self.data_dir), cache_dir=_absolute(self.cache_dir))
        except UserError:  # as in `DataConfig.with_absolute_folder`
            return self


def _absolute(folder: str | None) -> str | None:
    """The absolute path of a folder. Addresses such as gs://bucket/folder, which TFDS also reads, stay as they are."""
    return folder if folder is None or "://" in folder else str(Path(folder).absolute())


@dataclass(frozen=True)
class DistributedConfig(Checked):
    """The processes of the job. They are not saved with the run; other processes may resume it."""

    # Where the processes meet: HOST:PORT, a host and a free port of process 0. Needs --num-processes and --process-id.
    # TPU pods, SLURM and other clusters that JAX detects need none of the three.
    coordinator: str | None = None
    # Number of processes. 1 runs alone, even where JAX detects a cluster.
    num_processes: int | None = int_field(None, 1)
    # Number of this process, from 0.
    process_id: int | None = int_field(None, 0)
    # Seconds without a heartbeat before a process is considered lost and all exit.
    heartbeat_timeout: int = int_field(100, 5)
    # Seconds without a finished training step before the processes exit, for example because one of them hangs.
    step_timeout: int = int_field(600, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coordinator is None:
            remedy = "give --coordinator, --num-processes and --process-id together"
            require(self.num_processes in (None, 1), "num_processes", self.num_processes, remedy)
            require(self.process_id is None, "process_id", self.process_id, remedy)
            return
        host, _, port = self.coordinator.rpartition(":")
        remedy = "give HOST:PORT, a host and a free port of process 0, for example 10.0.0.1:1234"
        require(bool(host) and port.isdecimal() and 0 < int(port) < 2**16, "coordinator", self.coordinator, remedy)
        remedy = "give --num-processes and --process-id with it"
        require(None not in (self.num_processes, self.process_id), "coordinator", self.coordinator, remedy)
        remedy = f"with --num-processes {self.num_processes}, give a number less than that"
        require(self.process_id < self.num_processes, "process_id", self.process_id, remedy)  # type: ignore[operator]
