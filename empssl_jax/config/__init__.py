"""Every option, its default and its check. Imports nothing of the package; everything else may import it.

Read options.py first: the options of a training run, in groups, which run_config.py combines with those of
evaluation_options.py. command_options.py has those of the other commands, checked_fields.py the checks, errors.py the
errors a user sees.
"""

from empssl_jax.config.evaluation_options import EmbeddedLayer, EmbeddingConfig, EvaluationConfig, LabelConfig
from empssl_jax.config.options import (
    DataConfig,
    DistributedConfig,
    ModelConfig,
    PatchConfig,
    RunConfig,
    TrainingConfig,
)
from empssl_jax.config.run_config import Config, training_differences

__all__ = [
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EmbeddedLayer",
    "EmbeddingConfig",
    "EvaluationConfig",
    "LabelConfig",
    "ModelConfig",
    "PatchConfig",
    "RunConfig",
    "TrainingConfig",
    "training_differences",
]
