"""CIFAR-10 as docs/recipe.md would do it: trained as published, embeddings of plain crops.

    python train.py --config configs/cifar10_best.py
    python eval.py --workdir runs/cifar10_best

For a GPU or TPU, where it has not been run yet. What it changes was chosen on training images at a quarter of the width
(docs/recipe.md). `--valid-crops random --valid-patches 128` brings the paper's recipe back.
"""

from empssl_jax.config import Config, EvaluationConfig, RunConfig

config = Config(
    evaluation=EvaluationConfig(valid_crops="grid", valid_patches=64),
    run=RunConfig(workdir="runs/cifar10_best"),
)
