"""The encoder of EMP-SSL: a ResNet, a hidden layer whose output is the embedding, and a projection head."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from empssl_jax.config import EmbeddedLayer, ModelConfig
from empssl_jax.method.batch_norm import BatchNorm
from empssl_jax.method.resnet import ResNet, cell_means

CIFAR_STEM = "['backbone']['stem']"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class EncoderState(NamedTuple):
    """The arrays of an encoder, as nested dictionaries."""

    params: PyTree[Float[Array, "..."]]
    batch_stats: PyTree[Float[Array, "..."]]


class Encoder(nnx.Module):
    """Maps patches to embeddings, which are kept after training, and to projections, which the loss compares.

    Its kernels are zeros; `init_encoder` draws them.

    Args:
        config: sizes, and the precision (not "auto") of activations and matrix products. Parameters and BatchNorm
            statistics are float32.
        axis_name: mesh axis over which BatchNorm shares its statistics; None outside `jax.shard_map`.
        remat: compute the activations inside residual blocks again in the backward pass instead of storing them.
    """

    def __init__(self, config: ModelConfig, *, axis_name: str | None = None, remat: bool = False):
        dtype, zeros = DTYPES[config.precision], jax.nn.initializers.zeros

        def linear(features_in: int, features_out: int, use_bias: bool = False) -> nnx.Linear:
            options = {"kernel_init": zeros, "use_bias": use_bias, "dtype": dtype, "rngs": nnx.Rngs(0)}
            return nnx.Linear(features_in, features_out, **options)

        self.backbone = ResNet(config, dtype=dtype, axis_name=axis_name, remat=remat)
        self.hidden = linear(self.backbone.features_out, config.hidden_dim)
        self.hidden_norm = BatchNorm(config.hidden_dim, axis_name)
        self.projector = linear(config.hidden_dim, config.hidden_dim)
        self.projector_norm = BatchNorm(config.hidden_dim, axis_name)
        self.projection = linear(config.hidden_dim, config.projection_dim, use_bias=True)

    def __call__(self, patches: Float[Array, "N H W 3"]) -> tuple[Float[Array, "N E"], Float[Array, "N D"]]:
        """Embeddings and projections of N patches with values in [-1, 1], in float32; neither is normalised.

        The ResNet normalises the patches by the config's `input_mean` and `input_std`.

        In training mode (`encoder.train()`), BatchNorm uses the batch's statistics and updates the running ones.
        After `encoder.eval()`, it uses the running ones.
        """
        embeddings = self.embed(patches)
        hidden = nnx.relu(self.projector_norm(self.projector(embeddings)))
        return embeddings.astype(jnp.float32), self.projection(hidden).astype(jnp.float32)

    def embed(self, patches: Float[Array, "N H W 3"]) -> Float[Array, "N E"]:
        """Embeddings alone, in the encoder's dtype."""
        return self._hidden_features(self.backbone(patches))

    def _hidden_features(self, means: Float[Array, "*batch C"]) -> Float[Array, "*batch E"]:
        """Hidden features of the mean of a patch's last feature map, or of each cell of it."""
        return nnx.relu(self.hidden_norm(self.hidden(means)))

    def embed_cells(self, images: Float[Array, "N H W 3"], layer: EmbeddedLayer, cells: int) -> Float[Array, "N K F"]:
        """Features of K equal cells of images of any size, `cells` along each side, in the encoder's dtype.

        They are hidden features, or the cell's means of the stages' maps, all stages concatenated; or these and then
        those.
        """
        means = [cell_means(x, cells) for x in self.backbone.stage_maps(images)]
        hidden = [] if layer == "stages" else [self._hidden_features(means[-1])]
        return jnp.concatenate(hidden if layer == "hidden" else means + hidden, axis=-1)


def with_known_precision(config: ModelConfig) -> ModelConfig:
    """The config with what "auto" selects on this machine: float32 on CPU, bfloat16 on accelerators."""
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision="float32" if jax.default_backend() == "cpu" else "bfloat16")


def encoder_graph(config: ModelConfig, axis_name: str | None = None, remat: bool = False) -> nnx.GraphDef:
    """The encoder without its arrays. In a jitted function, `nnx.merge(graph, *encoder_state)` makes it an Encoder."""
    return nnx.graphdef(nnx.eval_shape(lambda: Encoder(config, axis_name=axis_name, remat=remat)))


@functools.partial(jax.jit, static_argnums=0)
def init_encoder(config: ModelConfig, key: Key[Array, ""]) -> EncoderState:
    """New parameters, drawn as in the reference implementations, and BatchNorm's initial statistics.

    Convolutions are torchvision's, except the CIFAR stem: the references put a new convolution in its place.
    """
    params, batch_stats = encoder_state(Encoder(config))
    paths, nodes = zip(*jax.tree.leaves_with_path(params, is_leaf=is_layer), strict=True)
    sizes = [sum(array.size for array in node.values()) if is_layer(node) else 0 for node in nodes]
    # One draw for all layers: see xla_cpu.py. It excludes -1 and 1, where the inverse error function is infinite.
    uniform = jax.random.uniform(key, (sum(sizes),), minval=np.nextafter(np.float32(-1), np.float32(0)))
    draws = jnp.split(uniform, np.cumsum(sizes)[:-1])
    torchvision = [config.stem == "imagenet" or jax.tree_util.keystr(path) != CIFAR_STEM for path in paths]
    layers = zip(nodes, draws, torchvision, strict=True)
    initial = [_init_layer(*layer) if is_layer(layer[0]) else layer[0] for layer in layers]
    return EncoderState(jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_layer), initial), batch_stats)


def is_layer(node: object) -> bool:
    """Whether a node of the parameters' tree is a convolution or a linear layer, as opposed to BatchNorm's arrays."""
    return isinstance(node, dict) and "kernel" in node


def _init_layer(layer: dict[str, Array], uniform: Float[Array, " n"], torchvision: bool) -> dict[str, Array]:
    """Turns numbers that are uniform in (-1, 1) into a layer's initial arrays.

    A convolution of torchvision is normal with variance 2 / fan out. All else has torch's default: uniform within
    1 / sqrt(fan in).
    """
    shape = layer["kernel"].shape
    fan_in, fan_out = (math.prod(shape) // features for features in (shape[-1], shape[-2]))

    def draw(uniform: Float[Array, " m"]) -> Float[Array, " m"]:
        if len(shape) == 4 and torchvision:  # sqrt(2) * erf_inv(uniform) is standard normal
            return jax.lax.erf_inv(uniform) * (2 / math.sqrt(fan_out))
        return uniform / math.sqrt(fan_in)

    pieces = jnp.split(uniform, np.cumsum([array.size for array in layer.values()])[:-1])
    return {name: draw(u).reshape(array.shape) for (name, array), u in zip(layer.items(), pieces, strict=True)}


def encoder_template(config: ModelConfig) -> EncoderState:
    """The shapes and dtypes of an encoder's arrays."""
    return jax.eval_shape(lambda: init_encoder(config, jax.random.key(0)))


def encoder_state(encoder: Encoder) -> EncoderState:
    """The arrays of an encoder."""
    params, batch_stats = (nnx.to_pure_dict(nnx.state(encoder, kind)) for kind in (nnx.Param, nnx.BatchStat))
    return EncoderState(params, batch_stats)
