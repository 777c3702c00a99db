"""The encoder of EMP-SSL: a ResNet, a hidden layer whose output is the embedding, and a projection."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from empssl_jax.batch_norm import BatchNorm
from empssl_jax.config import ModelConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

ZEROS = jax.nn.initializers.zeros


class EncoderState(NamedTuple):
    """The arrays of an encoder, as nested dictionaries."""

    params: PyTree[Float[Array, "..."]]
    batch_stats: PyTree[Float[Array, "..."]]


class Convolution(nnx.Conv):
    """A convolution without bias, padded as torch pads it."""

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

    def __call__(self, inputs, out_sharding=None):
        if self.kernel_size == (3, 3) and inputs.shape[1:3] == (2 * self.stride, 2 * self.stride):
            return self._to_2x2(inputs)
        return super().__call__(inputs, out_sharding=out_sharding)

    def _to_2x2(self, x):
        """A padded 3x3 convolution whose result is a 2x2 map is a dense layer from all positions to these four.

        XLA's CPU convolution takes 36 times as long on such maps (the last stage at a patch size of 16).
        """
        kernel, side = self.kernel[...].astype(self.dtype), x.shape[1]

        def reach(position):
            """How far the kernel lies from both edges at a position; where it is negative, it is cut."""
            first = self.stride * position - 1
            return first, side - first - 3, 0

        whole = (0, 0, 0)
        at = [
            [jax.lax.pad(kernel, kernel.dtype.type(0), [reach(i), reach(j), whole, whole]) for j in (0, 1)]
            for i in (0, 1)
        ]
        return jnp.einsum("nabc,ijabcd->nijd", x.astype(self.dtype), jnp.stack([jnp.stack(row) for row in at]))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2015, figure 5, left); the first may halve the map."""

    expansion = 1

    def __init__(self, features_in: int, features_out: int, stride: int, *, dtype, axis_name):
        self.conv1 = Convolution(features_in, features_out, 3, stride, dtype)
        self.norm1 = BatchNorm(features_out, axis_name)
        self.conv2 = Convolution(features_out, features_out, 3, 1, dtype)
        self.norm2 = BatchNorm(features_out, axis_name)
        self.shortcut = _shortcut(features_in, features_out, stride, dtype, axis_name)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2015, figure 5, right).

    The 3x3 convolution may halve the map, as in torchvision; in the paper it is the first one.
    """

    expansion = 4

    def __init__(self, features_in: int, features_out: int, stride: int, *, dtype, axis_name):
        features = features_out // self.expansion
        self.conv1 = Convolution(features_in, features, 1, 1, dtype)
        self.norm1 = BatchNorm(features, axis_name)
        self.conv2 = Convolution(features, features, 3, stride, dtype)
        self.norm2 = BatchNorm(features, axis_name)
        self.conv3 = Convolution(features, features_out, 1, 1, dtype)
        self.norm3 = BatchNorm(features_out, axis_name)
        self.shortcut = _shortcut(features_in, features_out, stride, dtype, axis_name)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + self.shortcut(x))


def _shortcut(features_in: int, features_out: int, stride: int, dtype, axis_name):
    if stride == 1 and features_in == features_out:
        return nnx.identity
    return nnx.Sequential(Convolution(features_in, features_out, 1, stride, dtype), BatchNorm(features_out, axis_name))


class Backbone(NamedTuple):
    """What makes one ResNet another."""

    block: type[BasicBlock] | type[Bottleneck]
    stage_sizes: tuple[int, int, int, int]  # blocks in each stage


BACKBONES = {
    "resnet18": Backbone(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Backbone(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Backbone(Bottleneck, (3, 4, 6, 3)),
}


def stage_dims(config: ModelConfig) -> list[int]:
    """Channels of each stage's map."""
    block, stage_sizes = BACKBONES[config.backbone]
    return [block.expansion * config.width * 2**stage for stage in range(len(stage_sizes))]


class ResNet(nnx.Module):
    """A ResNet without its classifier, laid out as torchvision's; returns the global average of its last map.

    The CIFAR stem is a 3x3 convolution of stride 1; the ImageNet stem, 7x7 of stride 2 and then max pooling, leaves a
    sixteenth of the positions.
    """

    def __init__(self, config: ModelConfig, *, dtype, axis_name, remat: bool):
        self.backbone, self.remat = config.backbone, remat
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
        return self.stage_means(x)[-1]

    def stage_means(self, x: Float[Array, "N H W 3"]) -> list[Float[Array, "N _"]]:
        """The global average of the last map of each stage."""
        x = nnx.relu(self.norm(self.stem(x)))
        if self.has_pooling:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        kind = BACKBONES[self.backbone]
        call: Callable = kind.block.__call__
        apply = nnx.remat(call) if self.remat else call
        blocks, means = iter(self.blocks), []
        for stage_size in kind.stage_sizes:
            for block in itertools.islice(blocks, stage_size):
                x = apply(block, x)
            means.append(jnp.mean(x, axis=(1, 2)))
        return means


class Encoder(nnx.Module):
    """Maps patches to embeddings (what is kept) and projections (what the loss sees).

    Its kernels are zeros; `init_encoder` draws them.

    Args:
        config: the sizes, and the precision (not "auto") of activations and matrix products; parameters and BatchNorm
            statistics are float32.
        axis_name: the mesh axis over which BatchNorm shares its statistics, None outside `jax.shard_map`.
        remat: compute the insides of the residual blocks again in the backward pass, in place of keeping them.
    """

    def __init__(self, config: ModelConfig, *, axis_name: str | None = None, remat: bool = False):
        dtype = DTYPES[config.precision]

        def linear(features_in, features_out, use_bias=False):
            options = {"kernel_init": ZEROS, "use_bias": use_bias, "dtype": dtype, "rngs": nnx.Rngs(0)}
            return nnx.Linear(features_in, features_out, **options)

        self.backbone = ResNet(config, dtype=dtype, axis_name=axis_name, remat=remat)
        self.hidden = linear(self.backbone.features_out, config.hidden_dim)
        self.hidden_norm = BatchNorm(config.hidden_dim, axis_name)
        self.projector = linear(config.hidden_dim, config.hidden_dim)
        self.projector_norm = BatchNorm(config.hidden_dim, axis_name)
        self.projection = linear(config.hidden_dim, config.projection_dim, use_bias=True)

    def __call__(self, patches: Float[Array, "N H W 3"]) -> tuple[Float[Array, "N E"], Float[Array, "N D"]]:
        """Embeddings and projections of N patches with values in [-1, 1], in float32; neither is normalised.

        In training mode (`encoder.train()`) BatchNorm uses the batch's statistics and updates the running ones;
        after `encoder.eval()` it uses the running ones.
        """
        embeddings = self.embed(patches)
        hidden = nnx.relu(self.projector_norm(self.projector(embeddings)))
        return embeddings.astype(jnp.float32), self.projection(hidden).astype(jnp.float32)

    def embed(self, patches: Float[Array, "N H W 3"]) -> Float[Array, "N E"]:
        """Embeddings alone, in the encoder's dtype."""
        return nnx.relu(self.hidden_norm(self.hidden(self.backbone(patches))))

    def embed_stages(self, patches: Float[Array, "N H W 3"]) -> Float[Array, "N S"]:
        """The means of all stages' maps side by side, in the encoder's dtype."""
        return jnp.concatenate(self.backbone.stage_means(patches), axis=1)


def default_precision() -> Literal["float32", "bfloat16"]:
    """What precision "auto" means here: bfloat16 where the hardware is made for it."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def encoder_graph(config: ModelConfig, axis_name: str | None = None, remat: bool = False) -> nnx.GraphDef:
    """The encoder without its arrays: `nnx.merge(graph, *encoder_state)` makes it whole inside a jitted function."""
    return nnx.graphdef(nnx.eval_shape(lambda: Encoder(config, axis_name=axis_name, remat=remat)))


@functools.partial(jax.jit, static_argnums=0)
def init_encoder(config: ModelConfig, key: Key[Array, ""]) -> EncoderState:
    """Fresh parameters, as torch and torchvision draw them, and BatchNorm statistics.

    All are cut from one draw: a draw for each array takes XLA 48 loops and seven times as long to compile.
    """
    params, batch_stats = encoder_state(Encoder(config))
    nodes, structure = jax.tree.flatten(params, is_leaf=is_layer)
    sizes = [sum(array.size for array in node.values()) if is_layer(node) else 0 for node in nodes]
    # Both ends are open: a normal number of the quantile 0 would be infinite.
    uniform = jax.random.uniform(key, (sum(sizes),), minval=np.nextafter(np.float32(-1), np.float32(0)))
    draws = jnp.split(uniform, np.cumsum(sizes)[:-1])
    nodes = [_init_layer(*pair) if is_layer(pair[0]) else pair[0] for pair in zip(nodes, draws, strict=True)]
    return EncoderState(jax.tree.unflatten(structure, nodes), batch_stats)


def is_layer(node: object) -> bool:
    """Whether a node of the parameters' tree is a convolution or a linear layer, as opposed to BatchNorm's arrays."""
    return isinstance(node, dict) and "kernel" in node


def _init_layer(layer: dict[str, Array], uniform: Float[Array, " n"]) -> dict[str, Array]:
    """A convolution's kernel is normal of variance 2 / fan out, a linear layer uniform within 1 / sqrt(fan in)."""
    shape = layer["kernel"].shape

    def draw(uniform):
        if len(shape) == 4:
            return jax.lax.erf_inv(uniform) * (2 / math.sqrt(math.prod(shape) // shape[2]))
        return uniform / math.sqrt(shape[0])

    pieces = jnp.split(uniform, np.cumsum([array.size for array in layer.values()])[:-1])
    return {name: draw(u).reshape(array.shape) for (name, array), u in zip(layer.items(), pieces, strict=True)}


def encoder_template(config: ModelConfig) -> EncoderState:
    """The shapes and types of an encoder's arrays."""
    return jax.eval_shape(lambda: init_encoder(config, jax.random.key(0)))


def encoder_state(encoder: Encoder) -> EncoderState:
    """The arrays of an encoder."""
    params, batch_stats = (nnx.to_pure_dict(nnx.state(encoder, kind)) for kind in (nnx.Param, nnx.BatchStat))
    return EncoderState(params, batch_stats)
