"""Built-in data: scikit-learn's 8x8 digits, enlarged to 32x32, and a narrow encoder. Nothing is downloaded.

    empssl train --config digits
    empssl eval --workdir runs/digits

Two cores of an AMD EPYC with AVX-512: 2 min 23 s for both commands and the installation together; kNN top-1 74.7 %
(four seeds, standard deviation 4.8), linear 72.8 % (seed 42). docs/results.md has more.
"""

from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig

config = Config(
    data=DataConfig(dataset="digits"),
    patches=PatchConfig(patch_size=16),
    model=ModelConfig(width=16, hidden_dim=512, projection_dim=128),
    training=TrainingConfig(batch_size=50, max_epochs=1),
    evaluation=EvaluationConfig(valid_patches=32, untrained=True),
    run=RunConfig(workdir="runs/digits"),
)
