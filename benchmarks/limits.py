"""What the machine can do, what the work needs, and so the fraction of the machine that the work reaches."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import ours
from benchmarks.sizes import Sizes
from empssl_jax.config import Config, ModelConfig, RunConfig


def best_seconds(work: Callable[[], jax.Array], repeats: int = 10) -> float:
    """The shortest of several runs: limits are what is possible, not what is usual."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matmul_flops(precision: str) -> float:
    """Measured peak of matrix products in FLOP/s: 2000^3 in float32 on CPU, 8192^3 in bfloat16 elsewhere."""
    size = 2000 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), precision)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / best_seconds(lambda: product(a))


def copy_bandwidth() -> float:
    """Measured bytes read and written in a second by adding 1 to 256 MB of float32."""
    a = jnp.zeros(64 * 2**20, jnp.float32)
    add = jax.jit(lambda a: a + 1)
    return 2 * a.nbytes / best_seconds(lambda: add(a))


def flops_per_patch(config: ModelConfig, patch_size: int, training: bool = True) -> float:
    """Multiplications and additions of convolutions and linear layers for one patch, counted by hand.

    Of the ResNet-18 with the CIFAR stem, that is, which every benchmark has.
    Products with the zeros of the padding count, as they do in other people's figures; XLA leaves them out. Training
    counts three passes, except for the stem, which needs no gradient of its input, and both heads; without training it
    is the embedding alone.
    """

    def convolution(size, features_in, features_out, side):
        return 2 * size**2 * features_in * features_out * side**2

    stem = convolution(3, 3, config.width, patch_size)
    rest, features_in, side = 0, config.width, patch_size
    for stage in range(4):
        features = config.width * 2**stage
        side = patch_size // 2**stage
        rest += convolution(3, features_in, features, side) + 3 * convolution(3, features, features, side)
        rest += convolution(1, features_in, features, side) if stage else 0
        features_in = features
    rest += 2 * features_in * config.hidden_dim
    if not training:
        return stem + rest
    rest += 2 * config.hidden_dim * (config.hidden_dim + config.projection_dim)
    return 2 * stem + 3 * rest


def temporary_bytes(sizes: Sizes, num_patches: int, remat: bool) -> int:
    """XLA's temporary memory of the train step at so many patches an image."""
    config = ours.make_config(sizes, sizes.patch_size)
    patches = dataclasses.replace(config.patches, train_patches=num_patches)
    config = dataclasses.replace(config, patches=patches, run=RunConfig(remat=remat))
    step, _, _ = ours.traced_step(config)
    return step.lower().compile().memory_analysis().temp_size_in_bytes


def measure(sizes: Sizes) -> dict[str, float]:
    """Peak, bandwidth, FLOPs of a patch in the train step by XLA's count and by hand, memory with and without remat."""
    config: Config = ours.make_config(sizes, sizes.patch_size)
    step, _, _ = ours.compiled_step(config)
    patches = sizes.images * sizes.patches
    many = 10 * sizes.patches
    return {
        "matmul_flops_per_second": matmul_flops(config.model.precision),
        "copy_bytes_per_second": copy_bandwidth(),
        "flops_per_patch_xla": step.cost_analysis()["flops"] / patches,
        "flops_per_patch_by_hand": flops_per_patch(config.model, sizes.patch_size),
        "embedding_flops_per_patch_by_hand": flops_per_patch(config.model, sizes.patch_size, training=False),
        "images": sizes.images,
        "patches": many,
        "temporary_bytes": temporary_bytes(sizes, many, remat=False),
        "temporary_bytes_with_remat": temporary_bytes(sizes, many, remat=True),
    }
