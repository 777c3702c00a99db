"""A whole embedder as an ONNX graph: images in, embeddings out, computed without JAX and this package.

Inside the graph, images have axes (N, C, H, W), each BatchNorm is folded into the kernel before it, and all crops of a
grid are one batch, which two matrix products cut out and resize.
"""

import dataclasses
import hashlib
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from flax import nnx
from jaxtyping import Array, Float

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError
from empssl_jax.evaluation.embeddings import cell_of, embedding_dim, num_features, whole_image_size
from empssl_jax.inference.image_encoder import ImageEncoder
from empssl_jax.method.batch_norm import BatchNorm
from empssl_jax.method.crops import Interpolation, crop_side, resize_matrix
from empssl_jax.method.encoder import Encoder, EncoderState, encoder_graph
from empssl_jax.method.patches import grid_offsets
from empssl_jax.method.resnet import (
    BACKBONES,
    BasicBlock,
    Bottleneck,
    Convolution,
    ProjectionShortcut,
    ResNet,
    cell_means,
    stage_dims,
)

OPSET, FORMAT_VERSION = 17, 8  # of 2022, which more programs read than newer ones
MAX_BYTES = 2**31 - 1  # of one file


class Graph:
    """An ONNX graph under construction, whose arrays are represented by their names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, operator: str, *inputs: Any, output: str = "", **attributes: Any) -> str:
        """Adds an operation on arrays of the graph (names) and constants (arrays); returns its output's name."""
        names = [array if isinstance(array, str) else self._constant(np.asarray(array)) for array in inputs]
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, names, [output], name=output, **attributes))
        return output

    def _constant(self, array: np.ndarray) -> str:
        """Equal constants are stored once: crops and whole images go through the same encoder."""
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        name = f"constant_{digest[:32]}"
        self.constants[name] = array
        return name


def to_onnx(encoder: ImageEncoder, metadata: dict[str, str]) -> bytes:
    """The content of an ONNX file that computes the embeddings of `encoder.embed` in float32.

    The input `images` is uint8 (N, S, S, 3), where S is the run's image size. The output `embeddings` is float32
    (N, E). The crops must not be random.

    Raises:
        UserError: the encoder is too large.
    """
    config, side, dim = encoder.config, encoder.image_size, embedding_dim(encoder.config)
    graph = Graph()
    _join_cells(graph, config, _embed(graph, config, encoder.state, "images", side))
    size = sum(array.nbytes for array in graph.constants.values())
    if size > MAX_BYTES:
        raise UserError(f"The encoder has {size} bytes and an ONNX file at most {MAX_BYTES}: give another --format.")
    inputs = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["N", side, side, 3])
    outputs = onnx.helper.make_tensor_value_info("embeddings", onnx.TensorProto.FLOAT, ["N", dim])
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    made = onnx.helper.make_graph(graph.nodes, "embedder", [inputs], [outputs], constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(made, opset_imports=[opset], ir_version=FORMAT_VERSION, producer_name="empssl_jax")
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def _embed(graph: Graph, config: Config, state: EncoderState, images: str, side: int) -> str:
    """The features (N, K, F) of all cells of images (N, S, S, 3), as `embeddings.make_embed` computes them."""
    encoder = nnx.merge(encoder_graph(dataclasses.replace(config.model, precision="float32")), *state)
    encoder.eval()
    evaluation, patches, layer = config.evaluation, config.patches, config.evaluation.embedded_layer
    planes = graph.add("Transpose", graph.add("Cast", images, to=onnx.TensorProto.FLOAT), perm=[0, 3, 1, 2])
    views = []
    if evaluation.has_patches:
        crop, size, number = crop_side(side, patches.patch_area), patches.patch_size, evaluation.valid_patches
        crops = _grid(graph, planes, side, crop, evaluation.grid_side, size, patches.interpolation)
        features = _embed_cells(graph, encoder, crops, size, layer, cells=1)
        features = graph.add("Reshape", features, np.array([-1, number, num_features(config.model, evaluation)]))
        cell_numbers = np.array([cell_of(i, evaluation) for i in range(number)])
        in_cell = np.eye(evaluation.cells**2, dtype=np.float32)[:, cell_numbers]
        views.append(graph.add("MatMul", in_cell / in_cell.sum(axis=1, keepdims=True), features))
    if evaluation.has_whole_image:
        size = whole_image_size(side, patches)
        whole = _grid(graph, planes, side, side, 1, size, patches.interpolation)
        views.append(_embed_cells(graph, encoder, whole, size, layer, evaluation.cells))
    return graph.add("Concat", *views, axis=1)


def _join_cells(graph: Graph, config: Config, cells: str) -> None:
    """As `embeddings.join_cells`: (N, K, F) -> `embeddings` (N, E)."""
    if config.evaluation.embedded_layer != "stages+hidden":
        graph.add("Flatten", cells, axis=1, output="embeddings")
        return
    bounds = 0, sum(stage_dims(config.model)), num_features(config.model, config.evaluation)
    begin, split, end, axis = (np.array([number]) for number in (*bounds, 2))
    stages = graph.add("Flatten", graph.add("Slice", cells, begin, split, axis), axis=1)
    hidden = graph.add("ReduceMean", graph.add("Slice", cells, split, end, axis), axes=[1], keepdims=0)
    graph.add("Concat", stages, hidden, axis=1, output="embeddings")


def _grid(
    graph: Graph, planes: str, side: int, crop: int, grid_side: int, size: int, interpolation: Interpolation
) -> str:
    """The crops (N * grid_side**2, 3, size, size) of a grid, in [-1, 1], as `patches.grid_patch` makes each of them.

    A matrix with the rows of all crops resizes the whole image to crops side by side.
    """
    offsets = grid_offsets(side, crop, grid_side)
    matrix = jnp.concatenate([resize_matrix(offset, crop, side, size, interpolation) for offset in offsets])
    lowest, highest = np.float32(0), np.float32(255)
    wide = graph.add("Clip", graph.add("MatMul", planes, matrix.T), lowest, highest)
    mosaic = graph.add("Clip", graph.add("MatMul", matrix, wide), lowest, highest)
    mosaic = graph.add("Sub", graph.add("Div", mosaic, np.float32(127.5)), np.float32(1))
    apart = graph.add("Reshape", mosaic, np.array([-1, 3, grid_side, size, grid_side, size]))
    crops = graph.add("Transpose", apart, perm=[0, 2, 4, 1, 3, 5])
    return graph.add("Reshape", crops, np.array([-1, 3, size, size]))


def _embed_cells(graph: Graph, encoder: Encoder, images: str, side: int, layer: str, cells: int) -> str:
    """As `Encoder.embed_cells`: (N, 3, side, side) -> (N, K, F)."""
    shape = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    sides = [shape.shape[1] for shape in jax.eval_shape(encoder.backbone.stage_maps, shape)]
    maps = _stage_maps(graph, encoder.backbone, images)
    means = [_cell_means(graph, *of_stage, cells) for of_stage in zip(maps, sides, strict=True)]
    if layer == "stages":
        return graph.add("Concat", *means, axis=-1)
    slope, offset = encoder.hidden_norm.running_slope_and_offset()
    hidden = graph.add("MatMul", means[-1], encoder.hidden.kernel[...] * slope)
    hidden = graph.add("Relu", graph.add("Add", hidden, offset))
    return hidden if layer == "hidden" else graph.add("Concat", *means, hidden, axis=-1)


def _cell_means(graph: Graph, x: str, side: int, cells: int) -> str:
    """As `resnet.cell_means`: (N, C, side, side) -> (N, K, C). Along each axis, the means are a matrix product."""
    unit_columns = jnp.eye(side)[:, :, None, None]  # images of one column, each with a single 1
    matrix: Float[Array, "side cells"] = cell_means(unit_columns, cells)[:, ::cells, 0]
    means = graph.add("MatMul", matrix.T, graph.add("MatMul", x, matrix))
    return graph.add("Transpose", graph.add("Reshape", means, np.array([0, 0, cells**2])), perm=[0, 2, 1])


def _stage_maps(graph: Graph, resnet: ResNet, x: str) -> list[str]:
    """As `ResNet.stage_maps`."""
    mean, std = (np.array(channels).reshape(3, 1, 1) for channels in (resnet.input_mean, resnet.input_std))
    x = graph.add("Div", graph.add("Sub", x, np.float32(2 * mean - 1)), np.float32(2 * std))
    x = graph.add("Relu", _convolve(graph, x, resnet.stem, resnet.norm))
    if resnet.has_pooling:
        x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    blocks, maps = iter(resnet.blocks), []
    for stage_size in BACKBONES[resnet.backbone].stage_sizes:
        for block in itertools.islice(blocks, stage_size):
            x = _block(graph, x, block)
        maps.append(x)
    return maps


def _block(graph: Graph, x: str, block: BasicBlock | Bottleneck) -> str:
    y = graph.add("Relu", _convolve(graph, x, block.conv1, block.norm1))
    y = _convolve(graph, y, block.conv2, block.norm2)
    if isinstance(block, Bottleneck):
        y = _convolve(graph, graph.add("Relu", y), block.conv3, block.norm3)
    if isinstance(block.shortcut, ProjectionShortcut):
        convolution, norm = block.shortcut.layers
        x = _convolve(graph, x, cast(Convolution, convolution), cast(BatchNorm, norm))
    return graph.add("Relu", graph.add("Add", y, x))


def _convolve(graph: Graph, x: str, convolution: Convolution, norm: BatchNorm) -> str:
    """As `resnet.normalised` with running statistics."""
    slope, offset = norm.running_slope_and_offset()
    kernel = jnp.transpose(convolution.kernel[...] * slope, (3, 2, 0, 1))  # to (O, I, kh, kw)
    pads, strides = [convolution.padding] * 4, [convolution.stride] * 2
    return graph.add("Conv", x, kernel, offset, pads=pads, strides=strides)
