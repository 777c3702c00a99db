"""CIFAR-10 in an hour on two CPU cores with AVX-512: half the width, 16x16 patches that are not resized, two epochs.

    python train.py --config configs/cifar10_cpu.py
    python eval.py --workdir runs/cifar10_cpu

CIFAR-10 (JPEG q75), 50,000 images and 10,000 test images, one seed: kNN 79.2 % top-1 and 98.0 % top-5, linear 76.9 and
98.8 % (commit 5da6f8e). That took 139 minutes on two cores of an AMD EPYC with AVX2; with AVX-512, two cores train on
45,000 images and embed the other 5,000 in 44 minutes (docs/recipe.md, which also lists faster encoders).
"""

from empssl_jax.config import Config, EvaluationConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig

config = Config(
    patches=PatchConfig(patch_size=16),
    model=ModelConfig(width=32, hidden_dim=1024, projection_dim=256),
    training=TrainingConfig(batch_size=50, max_epochs=2),
    evaluation=EvaluationConfig(valid_crops="grid", valid_patches=16, embedded_layer="stages", cells=2, whiten=True),
    run=RunConfig(workdir="runs/cifar10_cpu", checkpoint_every=100),
)
