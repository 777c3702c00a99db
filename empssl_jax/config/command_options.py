"""The options of every command but `train`, whose options are those of a run (options.py)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from empssl_jax.config.checked_fields import Checked, path_field
from empssl_jax.config.options import DistributedConfig, EmbeddingConfig, EvaluationConfig, RunConfig

CheckpointChoice = int | Literal["latest", "best"]


@dataclass(frozen=True)
class EvaluateOptions(Checked):
    """What to evaluate."""

    # Folder of a run of train.py. With several, such as runs/*, missing measurements are made and all are compared.
    workdir: str = path_field(RunConfig.workdir)
    # Checkpoint to restore: its step, the newest ("latest"), or the one with the lowest loss ("best").
    step: CheckpointChoice = "latest"
    # Folder with train.npz and test.npz to evaluate instead of a checkpoint.
    embeddings: str | None = path_field(None)
    # Folder of prepared TFDS data sets. Default: the run's, then $TFDS_DATA_DIR, then ~/tensorflow_datasets.
    data_dir: str | None = path_field(None)
    # Folder for decoded images. Default: the run's, then empssl_jax/images in the user's cache folder.
    cache_dir: str | None = path_field(None)
    evaluation: OmitArgPrefixes[EvaluationConfig] = dataclasses.field(default_factory=EvaluationConfig)
    distributed: OmitArgPrefixes[DistributedConfig] = dataclasses.field(default_factory=DistributedConfig)


@dataclass(frozen=True)
class EmbedOptions(Checked):
    """What to embed, and with which encoder."""

    # One image file, or a folder of them, subfolders included.
    images: str = path_field()
    # Folder of a run.
    workdir: str = path_field(RunConfig.workdir)
    # File to write: `embeddings` (N, E) float32; `files`, their N names relative to the folder; and `unreadable`, the
    # names of files that were skipped.
    output: str = path_field("embeddings.npz")
    # Checkpoint to use: its step, the newest ("latest"), or the one with the lowest loss ("best").
    step: CheckpointChoice = "latest"
    embedding: OmitArgPrefixes[EmbeddingConfig] = dataclasses.field(default_factory=EmbeddingConfig)


@dataclass(frozen=True)
class ExportOptions(Checked):
    """Which weights to export, and where to."""

    # Folder of a run.
    run: Positional[str] = path_field()
    # A .safetensors file, or a file for torch.load, which needs PyTorch.
    format: Literal["safetensors", "torch"] = "safetensors"
    # Checkpoint to export: its step, the newest ("latest"), or the one with the lowest loss ("best").
    step: CheckpointChoice = "latest"
    # File to write. Default: weights.safetensors or weights.pt in the run's folder.
    output: str | None = path_field(None)


@dataclass(frozen=True)
class ImportOptions(Checked):
    """Which weights to import, and where to."""

    # A .safetensors file, or one of torch.save (.pt, .pth), which needs PyTorch.
    file: Positional[str] = path_field()
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

    # Folder of a run of train.py.
    run: Positional[str] = path_field()
    # Folder of prepared TFDS data sets. Default: the run's, then $TFDS_DATA_DIR, then ~/tensorflow_datasets.
    data_dir: str | None = path_field(None)
