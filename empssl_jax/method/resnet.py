"""ResNets with torchvision's layout, without the classifier."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

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


class Convolution(nnx.Module):
    """A convolution without bias, with torch's padding."""

    def __init__(self, features_in: int, features_out: int, size: int, stride: int, dtype: DTypeLike):
        self.kernel = nnx.Param(jnp.zeros((size, size, features_in, features_out)))  # `encoder.init_encoder` draws it
        self.stride, self.padding, self.dtype = stride, (size - 1) // 2, dtype

    def __call__(self, x: Float[Array, "N H W I"]) -> Float[Array, "N h w O"]:
        return self.convolve(x, self.kernel[...])

    def convolve(self, x: Float[Array, "N H W I"], kernel: Float[Array, "size size I O"]) -> Float[Array, "N h w O"]:
        """The convolution with another kernel."""
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if kernel.shape[:2] == (3, 3) and x.shape[1:3] == (2 * self.stride, 2 * self.stride):  # see xla_cpu.py
            return convolution_to_2x2(x, kernel, self.stride)
        strides, padding = (self.stride, self.stride), [(self.padding, self.padding)] * 2
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def normalised(x: Float[Array, "N H W I"], convolution: Convolution, norm: BatchNorm) -> Float[Array, "N h w O"]:
    """`norm(convolution(x))`.

    With running statistics, the norm's slope is part of the kernel, and its offset is a bias. cuDNN's convolution then
    also adds the bias and the block's shortcut and applies the ReLU, so the map is not read and written again.
    """
    if not norm.use_running_average:
        return norm(convolution(x))
    slope, offset = norm.running_slope_and_offset()
    y = convolution.convolve(x, convolution.kernel[...] * slope)
    return y + offset.astype(y.dtype)


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
        y = nnx.relu(normalised(x, self.conv1, self.norm1))
        y = normalised(y, self.conv2, self.norm2)
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
        y = nnx.relu(normalised(x, self.conv1, self.norm1))
        y = nnx.relu(normalised(y, self.conv2, self.norm2))
        y = normalised(y, self.conv3, self.norm3)
        return nnx.relu(y + self.shortcut(x))


def _shortcut(
    features_in: int, features_out: int, stride: int, dtype: DTypeLike, axis_name: str | None
) -> Callable[[Array], Array]:
    if stride == 1 and features_in == features_out:
        return nnx.identity
    return ProjectionShortcut(features_in, features_out, stride, dtype, axis_name)


class ProjectionShortcut(nnx.Module):
    """The shortcut of a block that changes the shape of the map: a normalised 1x1 convolution."""

    def __init__(self, features_in: int, features_out: int, stride: int, dtype: DTypeLike, axis_name: str | None):
        convolution = Convolution(features_in, features_out, 1, stride, dtype)
        self.layers = nnx.List([convolution, BatchNorm(features_out, axis_name)])

    def __call__(self, x: Float[Array, "N H W I"]) -> Float[Array, "N h w O"]:
        convolution, norm = self.layers
        return normalised(x, cast(Convolution, convolution), cast(BatchNorm, norm))


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
        x = nnx.relu(normalised(x, self.stem, self.norm))
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
