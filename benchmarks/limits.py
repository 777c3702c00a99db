"""The machine's peak rates and the cost of a train step, which give the fraction of the peak that training reaches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import ours
from benchmarks.measure import run_times, temporary_bytes
from benchmarks.sizes import Sizes
from benchmarks.train_step import compile_step
from empssl_jax.config import ModelConfig, RunConfig
from empssl_jax.runtime.devices import device_mesh


def best_seconds(work: Callable[[], jax.Array], repeats: int = 10) -> float:
    """Seconds of the fastest of several runs, since a limit is the best case, not the typical one."""
    return min(times.wall for times in run_times(lambda: jax.block_until_ready(work()), repeats))


def matmul_flops(precision: str) -> float:
    """Measured peak rate of matrix products in FLOP/s, of size 2000^3 on CPU and 8192^3 elsewhere."""
    size = 2000 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), precision)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / best_seconds(lambda: product(a))


def copy_bandwidth() -> float:
    """Measured bytes read and written per second while adding 1 to 256 MB of float32."""
    a = jnp.zeros(64 * 2**20, jnp.float32)
    add = jax.jit(lambda a: a + 1)
    return 2 * a.nbytes / best_seconds(lambda: add(a))


def flops_per_patch(config: ModelConfig, patch_size: int, training: bool = True) -> float:
    """Multiplications and additions of convolutions and linear layers per patch, counted by hand.

    For the ResNet-18 with the CIFAR stem, which every benchmark uses. Products with the zeros of the padding count, as
    in published figures; XLA leaves them out. Training counts three passes, and two for the stem, which needs no
    gradient of its input. Without training, the count is one forward pass up to the embedding.
    """

    def convolution(size: int, features_in: int, features_out: int, side: int) -> int:
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


def step_memory(sizes: Sizes, num_patches: int, remat: bool) -> int:
    """Temporary memory of the train step with `num_patches` patches per image, in bytes."""
    config = ours.make_config(sizes, sizes.patch_size)
    patches = dataclasses.replace(config.patches, train_patches=num_patches)
    config = dataclasses.replace(config, patches=patches, run=RunConfig(remat=remat))
    return temporary_bytes(compile_step(config, device_mesh(1)))


def measure(sizes: Sizes) -> dict[str, float]:
    """Peak rates, FLOPs per patch of the train step by XLA's count and by hand, and memory with and without remat."""
    config = ours.make_config(sizes, sizes.patch_size)
    cost: Any = compile_step(config, device_mesh(1)).cost_analysis()
    patches = sizes.images * sizes.patches
    many_patches = 10 * sizes.patches
    return {
        "matmul_flops_per_second": matmul_flops(config.model.precision),
        "copy_bytes_per_second": copy_bandwidth(),
        "flops_per_patch_xla": cost["flops"] / patches,
        "flops_per_patch_by_hand": flops_per_patch(config.model, sizes.patch_size),
        "embedding_flops_per_patch_by_hand": flops_per_patch(config.model, sizes.patch_size, training=False),
        "images": sizes.images,
        "patches": many_patches,
        "temporary_bytes": step_memory(sizes, many_patches, remat=False),
        "temporary_bytes_with_remat": step_memory(sizes, many_patches, remat=True),
    }
