"""CIFAR-10 as docs/recipe.md would train it: as published, but for smaller batches and embeddings of plain crops.

    python train.py --config configs/cifar10_best.py
    python eval.py --workdir runs/cifar10_best

For a GPU or TPU, where it has not been run yet. What it changes was chosen on training images at a quarter of the width
(docs/recipe.md). `--valid-crops random --valid-patches 128 --batch-size 100` brings the paper's recipe back.
"""

from empssl_jax.config import Config, EvaluationConfig, RunConfig, TrainingConfig

config = Config(
    training=TrainingConfig(batch_size=50),
    evaluation=EvaluationConfig(valid_crops="grid", valid_patches=64),
    run=RunConfig(workdir="runs/cifar10_best"),
)
