"""The amount of work in one run of each benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Work = Callable[[], Any]  # returns when the work is done
IMAGE_SIDE = 32  # of CIFAR-10, where a config names no other


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmarks' work; the defaults are for two CPU cores."""

    images: int = 20  # of a train step; BatchNorm and the loss see images x patches
    patches: int = 20
    patch_size: int = 32
    small_patch_size: int = 16
    loss_images: int = 100
    more_loss_images: int = 1000
    augmented_images: int = 50  # the batch of configs/cifar10_cpu.py
    embedded_images: int = 1000
    embedded_patches: int = 16
    queries: int = 10_000
    bank: int = 50_000
    dim: int = 4096
    linear_images: int = 10_000
    linear_epochs: int = 5
    repeats: int = 5
    long_repeats: int = 1  # of benchmarks that take minutes on two cores


CPU = Sizes()
ACCELERATOR = Sizes(images=100, augmented_images=100, repeats=20, long_repeats=3)
TINY = Sizes(2, 2, 8, 8, 4, 6, 4, 4, 2, 20, 40, 64, 40, 2, 1, 1)  # for a rehearsal


def random_images(count: int, side: int = IMAGE_SIDE) -> np.ndarray:
    """Noise (count, side, side, 3), since the work does not depend on the content."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def random_vectors(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_labels(count: int) -> np.ndarray:
    """Labels of ten classes."""
    return np.random.default_rng(1).integers(0, 10, count)
