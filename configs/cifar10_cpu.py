"""CIFAR-10 on two CPU cores: a quarter of the width, patches left at 16x16.

python train.py --config configs/cifar10_cpu.py
python eval.py --workdir runs/cifar10_cpu
"""

from empssl_jax.config import Config, EvaluationConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig

config = Config(
    patches=PatchConfig(patch_size=16),
    model=ModelConfig(width=16, hidden_dim=1024, projection_dim=256),
    training=TrainingConfig(batch_size=50),
    evaluation=EvaluationConfig(valid_patches=16),
    run=RunConfig(workdir="runs/cifar10_cpu", checkpoint_every=100),
)
