"""The options of evaluation: how images are embedded and how embeddings are measured. Checked where they are made."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from empssl_jax.config.checked_fields import Checked, float_field, int_field
from empssl_jax.config.errors import counted, require

EmbeddedLayer = Literal["hidden", "stages", "stages+hidden"]


@dataclass(frozen=True)
class EmbeddingConfig(Checked):
    """How images are embedded."""

    # Patches averaged into an embedding; 0, for train only, skips embeddings and measurements.
    valid_patches: int = int_field(128, 0, 1_000_000)
    # random: patches made as in training, as in the paper. grid: crops on a regular grid, not augmented; 16 of them are
    # more accurate than 16 random ones. Their number must be a square. whole, with --valid-patches 1: the whole image
    # at once, at the scale of the patches. grid+whole: both, concatenated (docs/recipe.md).
    valid_crops: Literal["random", "grid", "whole", "grid+whole"] = "random"
    # What is averaged over the patches. hidden: hidden features, as in the paper. stages: the mean of each ResNet
    # stage's map, all four concatenated, which is shorter, and with --whiten more accurate. stages+hidden: both,
    # concatenated, which helps wide encoders after long training (docs/recipe.md).
    embedded_layer: EmbeddedLayer = "hidden"
    # Cells along each side of the image. Each cell averages its own patches of the grid, or its part of the whole
    # image's maps. The embedding concatenates the cells' means, which keeps positions; stages+hidden concatenates only
    # those of the stages. 1 averages everything, as in the paper.
    cells: int = int_field(1, 1, 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid_crops == "random":
            require(self.cells == 1, "cells", self.cells, "random crops belong to no cell, so give --valid-crops grid")
        if self.valid_crops == "whole":
            require(self.valid_patches <= 1, "valid_patches", self.valid_patches, "the whole image is one, so give 1")
        if not self.valid_crops.startswith("grid"):
            return
        side = self.grid_side
        remedy = "a grid has a square number of crops, for example 16"
        require(side**2 == self.valid_patches, "valid_patches", self.valid_patches, remedy)
        remedy = f"the cells divide the grid's {side} crops a side equally, so give a divisor of {side}"
        require(side % self.cells == 0, "cells", self.cells, remedy)

    def require_patches(self) -> None:
        """Raises UserError if `valid_patches` is 0, which skips embeddings at the end of training only."""
        example = {"random": 128, "whole": 1}.get(self.valid_crops, 16)
        require(self.valid_patches > 0, "valid_patches", 0, f"give the number of patches, such as {example}")

    @property
    def has_patches(self) -> bool:
        """Whether the embedding contains features of patches."""
        return self.valid_crops != "whole"

    @property
    def has_whole_image(self) -> bool:
        """Whether the embedding contains features of the whole image."""
        return self.valid_crops in ("whole", "grid+whole")

    @property
    def grid_side(self) -> int:
        """Crops along each side of a grid of `valid_patches`."""
        return math.isqrt(self.valid_patches)

    @property
    def embeddings(self) -> str:
        """How images are embedded, in words."""
        views = [counted(self.valid_patches, f"{self.valid_crops.split('+')[0]} patch")] * self.has_patches
        views += ["the whole image"] * self.has_whole_image
        parts = [" and ".join(views), self.embedded_layer] + [f"{self.cells}x{self.cells} cells"] * (self.cells > 1)
        return ", ".join(parts)


@dataclass(frozen=True)
class LabelConfig(Checked):
    """Which labels classifiers learn from."""

    # Learn from the labels of only this fraction of the training images, chosen at random within each class: the
    # nearest whole number of images, but at least one. The images of a smaller fraction are a subset of those of a
    # larger one.
    label_fraction: float = float_field(1.0, 1e-9, 1.0)
    # Seed of the choice of labels. It is independent of --seed, so all runs learn from the same labels.
    label_seed: int = int_field(0, 0)

    @property
    def labels(self) -> str:
        """The labels in words; empty if all are used."""
        if self.label_fraction == 1:
            return ""
        choice = f" (--label-seed {self.label_seed})" if self.label_seed != LabelConfig.label_seed else ""
        return f"{100 * self.label_fraction:g} % of labels{choice}"


@dataclass(frozen=True)
class EvaluationConfig(LabelConfig, EmbeddingConfig):
    """How images are embedded and embeddings measured."""

    # Images embedded at a time, over all devices. Default: 250 on CPU, 1,000 for each GPU or TPU.
    embedding_batch_size: int | None = int_field(None, 1, 100_000)
    # Also embed the mirrored training images, which kNN and the classifiers then learn from too, and for --logistic the
    # mirrored test images: logistic regression adds the scores of both kinds.
    mirror: bool = False
    # Whiten the embeddings before kNN, with mean and covariance of the training images' embeddings.
    whiten: bool = False
    # Neighbours that vote in kNN.
    num_neighbours: int = int_field(20, 1)
    # A neighbour of cosine similarity s has exp(s / temperature) votes.
    temperature: float = float_field(0.07, 0.02)
    # Epochs of the linear classifier; 0 skips it.
    linear_epochs: int = int_field(100, 0, 100_000)
    # Initial learning rate of the linear classifier; it decays to 0 along a half cosine.
    linear_learning_rate: float = float_field(0.03, 1e-9)
    # L2 penalty of the linear classifier.
    linear_weight_decay: float = float_field(5e-5, 0.0)
    # Batch size of the linear classifier.
    linear_batch_size: int = int_field(100, 1)
    # Also measure a logistic regression. Held-out training images choose its L2 penalty, and whether embeddings are
    # standardised or whitened for it. It is more accurate than the linear classifier, which is that of the paper, and
    # takes minutes on a CPU.
    logistic: bool = False
    # For train only: also measure kNN before training. A few passes first set BatchNorm's statistics; they change no
    # parameter.
    untrained: bool = False
    # Write report.html, a page of figures and explanations, at the end.
    report: bool = True

    @property
    def embedding(self) -> EmbeddingConfig:
        """The part about how images are embedded."""
        fields = dataclasses.fields(EmbeddingConfig)
        return EmbeddingConfig(**{field.name: getattr(self, field.name) for field in fields})

    @property
    def embeddings(self) -> str:
        """How the measured embeddings are made, in words."""
        return super().embeddings + ", also mirrored" * self.mirror + ", whitened for kNN" * self.whiten
