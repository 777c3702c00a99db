"""CIFAR-10 on two CPU cores: half the width, 16x16 patches that are not resized.

    empssl train --config cifar10_cpu --precision bfloat16
    empssl eval --workdir runs/cifar10_cpu

Each of the four epochs takes ten patches of each image. The learning rate falls linearly, which is a little better than
the published half cosine (docs/recipe.md). With AVX512_BF16, training took 35 minutes; embedding images and mirrored
images takes 20 on one core. On processors without AVX512_BF16, leave out --precision: the default on CPU, float32, is
faster there. Measured on the test images, three seeds: kNN 84.0 %, logistic regression 84.6 %, linear 82.0 %
(docs/results.md).
"""

from empssl_jax.config import Config, EvaluationConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig

config = Config(
    patches=PatchConfig(patch_size=16, train_patches=10),
    model=ModelConfig(width=32, hidden_dim=1024, projection_dim=256),
    training=TrainingConfig(batch_size=50, max_epochs=4, schedule="linear"),
    evaluation=EvaluationConfig(
        valid_crops="grid+whole",
        valid_patches=16,
        embedded_layer="stages",
        cells=2,
        mirror=True,
        whiten=True,
        logistic=True,
    ),
    run=RunConfig(workdir="runs/cifar10_cpu", checkpoint_every=250),
)
