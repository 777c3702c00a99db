"""The config of a training run: all groups of options, what they require of each other, and how two runs differ."""

import dataclasses
from dataclasses import dataclass
from typing import cast

from tyro.conf import OmitArgPrefixes

from empssl_jax.config.errors import UserError, flag, one_line, require, words
from empssl_jax.config.evaluation_options import EvaluationConfig
from empssl_jax.config.options import (
    TRAIN,
    DataConfig,
    DistributedConfig,
    ModelConfig,
    PatchConfig,
    RunConfig,
    TrainingConfig,
)

NO_PART_IN_TRAINING = ("test_split", "test_images_per_class", "strict_images")

# The loss's matrices have eigenvalues from 1 to dimension / eps. Above 1e6, float32 can lose what keeps them positive.
SMALLEST_EPS = 1e-5  # of the dimension


@dataclass(frozen=True)
class Config:
    """A training run."""

    data: OmitArgPrefixes[DataConfig] = dataclasses.field(default_factory=DataConfig)
    patches: OmitArgPrefixes[PatchConfig] = dataclasses.field(default_factory=PatchConfig)
    model: OmitArgPrefixes[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    training: OmitArgPrefixes[TrainingConfig] = dataclasses.field(default_factory=TrainingConfig)
    evaluation: OmitArgPrefixes[EvaluationConfig] = dataclasses.field(default_factory=EvaluationConfig)
    run: OmitArgPrefixes[RunConfig] = dataclasses.field(default_factory=RunConfig)
    distributed: OmitArgPrefixes[DistributedConfig] = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            group, kind = getattr(self, field.name), cast(type, field.default_factory)
            if not isinstance(group, kind):
                raise UserError(f"Config's {field.name} is {one_line(group)}: give {kind.__name__}(...).")
        smallest = self.model.projection_dim * SMALLEST_EPS
        remedy = f"give at least {smallest:.3g}, since float32 is not precise enough for less at --projection-dim "
        remedy += str(self.model.projection_dim)
        require(self.training.coding_rate_eps >= smallest, "coding_rate_eps", self.training.coding_rate_eps, remedy)
        patches, pieces = self.patches.train_patches, self.training.accumulate
        remedy = f"give a number that divides --train-patches, which is {patches}"
        require(patches % pieces == 0, "accumulate", pieces, remedy)


def training_differences(ours: Config, theirs: Config) -> list[str]:
    """The options that differ between two runs and change what is learned, as "--option ours (was theirs)"."""
    differences = []
    for group in ("data", "patches", "model", "training"):
        for field in dataclasses.fields(getattr(ours, group)):
            mine, other = (getattr(getattr(config, group), field.name) for config in (ours, theirs))
            if field.name == "train_split":  # earlier versions saved the default as its name
                mine, other = mine or TRAIN, other or TRAIN
            if mine != other and field.name not in NO_PART_IN_TRAINING:
                differences.append(f"{flag(field.name)} {' '.join(words(mine))} (was {' '.join(words(other))})")
    return differences
