"""The encoder of EMP-SSL: a ResNet-18 for small images, a hidden layer whose output is the embedding, a projection."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from empssl_jax.config import ModelConfig

STATISTICS_MOMENTUM = 0.9  # share of itself that a running statistic keeps in a step
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# torchvision's initialisation of a ResNet's convolutions.
CONVOLUTION_INIT = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _uniform_within(bound: float):
    """torch's initialisation of linear layers, with a bound of 1 / sqrt(fan in)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class EncoderState(NamedTuple):
    """The arrays of an encoder, as nested dictionaries."""

    params: PyTree[Float[Array, "..."]]
    batch_stats: PyTree[Float[Array, "..."]]


class Convolution(nnx.Conv):
    """A convolution without bias, padded as torch pads it."""

    def __init__(self, features_in: int, features_out: int, size: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(
            features_in,
            features_out,
            kernel_size=(size, size),
            strides=stride,
            padding=(size - 1) // 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=CONVOLUTION_INIT,
            rngs=rngs,
        )

    def __call__(self, inputs, out_sharding=None):
        if inputs.shape[1:3] == (2, 2) and self.kernel_size == (3, 3) and self.strides == 1:
            return self._on_2x2(inputs)
        return super().__call__(inputs, out_sharding=out_sharding)

    def _on_2x2(self, x):
        """A padded 3x3 convolution of a 2x2 map is a dense layer from 4 to 4 positions.

        XLA's CPU convolution takes 36 times as long on such maps (the last stage at a patch size of 16), and the
        dense form needs 16 of the 36 multiplications on every device, the others being by the padding's zeros.
        """
        kernel = self.kernel[...].astype(self.dtype)
        dense = jnp.stack([jnp.stack([kernel[1 - i : 3 - i, 1 - j : 3 - j] for j in (0, 1)]) for i in (0, 1)])
        return jnp.einsum("nabc,ijabcd->nijd", x.astype(self.dtype), dense)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation as torch defines it, its statistics shared by all devices along `axis_name`.

    Flax keeps a running average of the biased variance, torch of the unbiased one: n / (n - 1) times larger, which
    matters for the small batches of the golden numbers and costs nothing.
    """

    def __init__(self, features: int, dtype: DTypeLike, axis_name: str | None, rngs: nnx.Rngs):
        super().__init__(
            features, momentum=STATISTICS_MOMENTUM, epsilon=1e-5, dtype=dtype, axis_name=axis_name, rngs=rngs
        )

    def __call__(self, x, use_running_average: bool | None = None, *, mask=None):
        decayed = self.momentum * self.var[...]
        y = super().__call__(x, use_running_average, mask=mask)
        if not (self.use_running_average if use_running_average is None else use_running_average):
            devices = jax.lax.axis_size(self.axis_name) if self.axis_name else 1
            n = devices * x.size // x.shape[-1]
            self.var[...] = decayed + (self.var[...] - decayed) * (n / max(n - 1, 1))
        return y


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2015, figure 2); the first may halve the map."""

    def __init__(self, features_in: int, features_out: int, stride: int, *, dtype, axis_name, rngs: nnx.Rngs):
        self.conv1 = Convolution(features_in, features_out, 3, stride, dtype, rngs)
        self.norm1 = BatchNorm(features_out, dtype, axis_name, rngs)
        self.conv2 = Convolution(features_out, features_out, 3, 1, dtype, rngs)
        self.norm2 = BatchNorm(features_out, dtype, axis_name, rngs)
        if stride == 1 and features_in == features_out:
            self.shortcut = nnx.identity
        else:
            convolution = Convolution(features_in, features_out, 1, stride, dtype, rngs)
            self.shortcut = nnx.Sequential(convolution, BatchNorm(features_out, dtype, axis_name, rngs))

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class ResNet18(nnx.Module):
    """ResNet-18 with a 3x3 stem of stride 1 and no max pooling, as for 32x32 images; returns the global average."""

    def __init__(self, width: int, *, dtype, axis_name, rngs: nnx.Rngs):
        self.stem = Convolution(3, width, 3, 1, dtype, rngs)
        self.norm = BatchNorm(width, dtype, axis_name, rngs)
        blocks, features_in = [], width
        for stage in range(4):
            for block in range(2):
                features_out, stride = width * 2**stage, 2 if stage > 0 and block == 0 else 1
                block_options = {"dtype": dtype, "axis_name": axis_name, "rngs": rngs}
                blocks.append(ResidualBlock(features_in, features_out, stride, **block_options))
                features_in = features_out
        self.blocks = nnx.List(blocks)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return jnp.mean(x, axis=(1, 2))


class Encoder(nnx.Module):
    """Maps patches to embeddings (what is kept) and projections (what the loss sees).

    Args:
        config: the sizes, and the precision (not "auto") of activations and matrix products; parameters and BatchNorm
            statistics are float32.
        axis_name: the mesh axis over which BatchNorm shares its statistics, None outside `jax.shard_map`.
        rngs: draws the parameters.
    """

    def __init__(self, config: ModelConfig, *, axis_name: str | None = None, rngs: nnx.Rngs):
        dtype = DTYPES[config.precision]

        def linear(features_in, features_out, use_bias=False):
            init = _uniform_within(features_in**-0.5)
            options = {"kernel_init": init, "bias_init": init, "use_bias": use_bias, "dtype": dtype}
            return nnx.Linear(features_in, features_out, rngs=rngs, **options)

        self.backbone = ResNet18(config.width, dtype=dtype, axis_name=axis_name, rngs=rngs)
        self.hidden = linear(8 * config.width, config.hidden_dim)
        self.hidden_norm = BatchNorm(config.hidden_dim, dtype, axis_name, rngs)
        self.projector = linear(config.hidden_dim, config.hidden_dim)
        self.projector_norm = BatchNorm(config.hidden_dim, dtype, axis_name, rngs)
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


def default_precision() -> Literal["float32", "bfloat16"]:
    """What precision "auto" means here: bfloat16 where the hardware is made for it."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def encoder_graph(config: ModelConfig, axis_name: str | None = None) -> nnx.GraphDef:
    """The encoder without its arrays: `nnx.merge(graph, *encoder_state)` makes it whole inside a jitted function."""
    return nnx.graphdef(nnx.eval_shape(lambda: Encoder(config, axis_name=axis_name, rngs=nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=0)
def init_encoder(config: ModelConfig, key: Key[Array, ""]) -> EncoderState:
    """Fresh parameters and BatchNorm statistics."""
    return encoder_state(Encoder(config, rngs=nnx.Rngs(key)))


def encoder_state(encoder: Encoder) -> EncoderState:
    """The arrays of an encoder."""
    params, batch_stats = (nnx.to_pure_dict(nnx.state(encoder, kind)) for kind in (nnx.Param, nnx.BatchStat))
    return EncoderState(params, batch_stats)
