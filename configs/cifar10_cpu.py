"""CIFAR-10 on two CPU cores: a quarter of the width, patches left at 16x16.

python train.py --config configs/cifar10_cpu.py
python eval.py --workdir runs/cifar10_cpu

Two cores of an AMD EPYC with AVX2, CIFAR-10 (JPEG q75), one seed: kNN 61.4 % top-1 and 94.4 % top-5, linear 66.5 % and
97.0 %. Training, embeddings and kNN took 48 minutes beside other work on the same cores (59 minutes of CPU time).
"""

from empssl_jax.config import Config, EvaluationConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig

config = Config(
    patches=PatchConfig(patch_size=16),
    model=ModelConfig(width=16, hidden_dim=1024, projection_dim=256),
    training=TrainingConfig(batch_size=50),
    evaluation=EvaluationConfig(valid_crops="grid", valid_patches=16, embedded_layer="stages", cells=2, whiten=True),
    run=RunConfig(workdir="runs/cifar10_cpu", checkpoint_every=100),
)
