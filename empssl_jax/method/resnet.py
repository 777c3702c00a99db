"""ResNets with torchvision's layout, without the classifier."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from empssl_jax.config import ModelConfig
from empssl_jax.config.options import BackboneName
from empssl_jax.method.batch_norm import BatchNorm
from empssl_jax.method.xla_cpu import convolution_to_2x2

ZEROS = jax.nn.initializers.zeros  # for kernels, which `encoder.init_encoder` draws


class Convolution(nnx.Conv):
    """A convolution without bias, with torch's padding."""

    def __init__(self, features_in: int, features_out: int, size: int, stride: int, dtype: DTypeLike):
        super().__init__(
            features_in,
            features_out,
            kernel_size=(size, size),
            strides=stride,
            padding=(size - 1) // 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=ZEROS,
            rngs=nnx.Rngs(0),
        )
        self.stride = stride

    def __call__(self, inputs: Float[Array, "N H W I"], out_sharding: Any = None) -> Float[Array, "N h w O"]:
        if self.kernel_size == (3, 3) and inputs.shape[1:3] == (2 * self.stride, 2 * self.stride):  # see xla_cpu.py
            return convolution_to_2x2(inputs.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)
        return super().__call__(inputs, out_sharding=out_sharding)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2015, figure 5, left); the first may halve the map."""

    expansion = 1

    def __init__(self, features_in: int, features_out: int, stride: int, *, dtype: DTypeLike, axis_name: str | None):
        self.conv1 = Convolution(features_in, features_out, 3, stride, dtype)
        self.norm1 = BatchNorm(features_out, axis_name)
        self.conv2 = Convolution(features_out, features_out, 3, 1, dtype)
        self.norm2 = BatchNorm(features_out, axis_name)
        self.shortcut = _shortcut(features_in, features_out, stride, dtype, axis_name)

    def __call__(self, x: Float[Array, "N H W I"]) -> Float[Array, "N h w O"]:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2015, figure 5, right).

    The 3x3 convolution may halve the map, as in torchvision; in the paper it is the first one.
    """

    expansion = 4

    def __init__(self, features_in: int, features_out: int, stride: int, *, dtype: DTypeLike, axis_name: str | None):
        features = features_out // self.expansion
        self.conv1 = Convolution(features_in, features, 1, 1, dtype)
        self.norm1 = BatchNorm(features, axis_name)
        self.conv2 = Convolution(features, features, 3, stride, dtype)
        self.norm2 = BatchNorm(features, axis_name)
        self.conv3 = Convolution(features, features_out, 1, 1, dtype)
        self.norm3 = BatchNorm(features_out, axis_name)
        self.shortcut = _shortcut(features_in, features_out, stride, dtype, axis_name)

    def __call__(self, x: Float[Array, "N H W I"]) -> Float[Array, "N h w O"]:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + self.shortcut(x))


def _shortcut(
    features_in: int, features_out: int, stride: int, dtype: DTypeLike, axis_name: str | None
) -> Callable[[Array], Array]:
    if stride == 1 and features_in == features_out:
        return nnx.identity
    return nnx.Sequential(Convolution(features_in, features_out, 1, stride, dtype), BatchNorm(features_out, axis_name))


class Backbone(NamedTuple):
    """The choices that distinguish ResNets."""

    block: type[BasicBlock] | type[Bottleneck]
    stage_sizes: tuple[int, int, int, int]  # blocks in each stage


BACKBONES: dict[BackboneName, Backbone] = {
    "resnet18": Backbone(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Backbone(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Backbone(Bottleneck, (3, 4, 6, 3)),
}


def stage_dims(config: ModelConfig) -> list[int]:
    """Number of channels of each stage's map."""
    block, stage_sizes = BACKBONES[config.backbone]
    return [block.expansion * config.width * 2**stage for stage in range(len(stage_sizes))]


class ResNet(nnx.Module):
    """A ResNet without its classifier; returns the global average of its last map.

    The CIFAR stem is a 3x3 convolution of stride 1. The ImageNet stem is a 7x7 convolution of stride 2 and then max
    pooling, which together leave a sixteenth of the positions.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, axis_name: str | None, remat: bool):
        self.backbone, self.remat = config.backbone, remat
        self.input_mean, self.input_std = config.input_mean, config.input_std
        self.has_pooling = config.stem == "imagenet"
        size, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.stem = Convolution(3, config.width, size, stride, dtype)
        self.norm = BatchNorm(config.width, axis_name)
        block, stage_sizes = BACKBONES[config.backbone]
        blocks, features_in = [], config.width
        for stage, features_out in enumerate(stage_dims(config)):
            for number in range(stage_sizes[stage]):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(block(features_in, features_out, stride, dtype=dtype, axis_name=axis_name))
                features_in = features_out
        self.blocks = nnx.List(blocks)
        self.features_out = features_in

    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N F"]:
        return jnp.mean(self.stage_maps(x)[-1], axis=(1, 2))

    def normalise_channels(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N H W 3"]:
        """(pixel - mean) / standard deviation, where pixels are from 0 to 1 and the input is 2 pixel - 1.

        By default this returns x. It is not folded into the stem, which pads with 0: the mean, not a pixel of 0.5.
        """
        mean, std = (np.array(channels, ndmin=4) for channels in (self.input_mean, self.input_std))
        return (x - np.float32(2 * mean - 1)) / np.float32(2 * std)

    def stage_maps(self, x: Float[Array, "N H W 3"]) -> list[Float[Array, "N _ _ _"]]:
        """Each stage's last map."""
        x = self.normalise_channels(x)
        x = nnx.relu(self.norm(self.stem(x)))
        if self.has_pooling:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        kind = BACKBONES[self.backbone]
        call: Callable = kind.block.__call__
        apply = nnx.remat(call) if self.remat else call
        blocks, maps = iter(self.blocks), []
        for stage_size in kind.stage_sizes:
            for block in itertools.islice(blocks, stage_size):
                x = apply(block, x)
            maps.append(x)
        return maps


def cell_means(x: Float[Array, "N H W C"], cells: int) -> Float[Array, "N K C"]:
    """The averages of a map over K equal cells, `cells` along each side, row by row.

    Where a position belongs to several cells, each cell counts its share of it.
    """
    for axis in (1, 2):
        x = jnp.repeat(x, cells // math.gcd(cells, x.shape[axis]), axis)
    size, height, width, channels = x.shape
    x = x.reshape(size, cells, height // cells, cells, width // cells, channels)
    return jnp.mean(x, axis=(2, 4)).reshape(size, cells**2, channels)
