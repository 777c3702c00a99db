"""Bag-of-features embeddings: the mean features of an image's patches (section 3.2 of the paper)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, Shaped, UInt8

from empssl_jax.config import Config, EmbeddingConfig, EvaluationConfig, ModelConfig, PatchConfig
from empssl_jax.config.errors import DivergenceError
from empssl_jax.data.datasets import Datasets, ImageDataset, Split
from empssl_jax.method.crops import crop_side
from empssl_jax.method.encoder import EncoderState, encoder_graph
from empssl_jax.method.patches import grid_patch, multi_patch
from empssl_jax.method.random_keys import embedding_patches_key
from empssl_jax.method.resnet import stage_dims
from empssl_jax.runtime.devices import own_rows, replicated, rows_to_devices, split_images, to_devices, to_host
from empssl_jax.runtime.progress import image_progress


class LabelledEmbeddings(NamedTuple):
    """Embeddings of a split and the classes of its images, -1 for images without a label."""

    embeddings: Float32[np.ndarray, "N E"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]
    names: Shaped[np.ndarray, " N"] | None = None  # of the files, for a folder of image files
    mirrored: Float32[np.ndarray, "N E"] | None = None  # embeddings of the mirrored images

    @property
    def num_classes(self) -> int:
        """Number of classes, including empty ones."""
        return len(self.class_names)

    def take(self, rows: Bool[np.ndarray, " N"] | Int[np.ndarray, " K"]) -> "LabelledEmbeddings":
        """The embeddings with these indices, or for which a mask is true."""
        names, mirrored = (None if array is None else array[rows] for array in (self.names, self.mirrored))
        return LabelledEmbeddings(self.embeddings[rows], self.labels[rows], self.class_names, names, mirrored)

    def keep_mirrored(self, wanted: bool) -> "LabelledEmbeddings":
        """The embeddings, without those of mirrored images unless these are wanted."""
        return self if wanted else self._replace(mirrored=None)

    def with_mirrored(self) -> "LabelledEmbeddings":
        """The embeddings and then those of the mirrored images, if there are any, with the same labels again."""
        if self.mirrored is None:
            return self
        embeddings = np.concatenate([self.embeddings, self.mirrored])
        return LabelledEmbeddings(embeddings, np.tile(self.labels, 2), self.class_names)


class Embeddings(NamedTuple):
    """The embeddings of a run."""

    bank: LabelledEmbeddings  # what kNN and the linear classifier learn from
    test: LabelledEmbeddings  # what they are measured on


def labelled(split: LabelledEmbeddings) -> LabelledEmbeddings:
    """The embeddings of the images that have a label."""
    has_label = split.labels >= 0
    return split if has_label.all() else split.take(has_label)


Embed = Callable[[EncoderState, UInt8[Array, "B H W 3"], Int[Array, " B"]], Float[Array, "B E"]]
MakePatch = Callable[[UInt8[Array, "B H W 3"], Int[Array, " B"], Int[Array, ""]], Float[Array, "B size size 3"]]


def make_embed(config: Config, mesh: Mesh) -> Embed:
    """The compiled function (encoder_state, images, indices) -> embeddings, with the images split over the devices.

    Cells have mean features over `valid_patches` patches, over the maps of the whole image, or both; `join_cells` makes
    them an embedding. A loop encodes one patch of every image at a time, so memory does not grow with their number.
    Configs with equal patches, encoders and embeddings share one compiled function, whatever their seeds.
    """
    seed = to_devices(np.array(config.training.seed, np.int32), replicated(mesh))
    return functools.partial(compiled_embed(config.model, config.patches, config.evaluation.embedding, mesh), seed)


@functools.cache
def compiled_embed(
    model: ModelConfig, patches: PatchConfig, options: EmbeddingConfig, mesh: Mesh
) -> Callable[..., Float[Array, "B E"]]:
    graph, num_cells = encoder_graph(model), options.cells**2

    def embed(
        seed: Int[Array, ""], encoder_state: EncoderState, images: UInt8[Array, "B H W 3"], indices: Int[Array, " B"]
    ) -> Float[Array, "B E"]:
        encoder = nnx.merge(graph, *encoder_state)
        encoder.eval()
        make_patch = _patch_maker(patches, options, embedding_patches_key(seed))

        def encode(patches: Float[Array, "B h w 3"], cells: int) -> Float[Array, "B K F"]:
            return encoder.embed_cells(patches, options.embedded_layer, cells).astype(jnp.float32)

        def add_patch(number: Int[Array, ""], sums: Float[Array, "B cells F"]) -> Float[Array, "B cells F"]:
            features = encode(make_patch(images, indices, number), cells=1)[:, 0]
            return sums.at[:, cell_of(number, options)].add(features)

        def mean_over_patches() -> Float[Array, "B cells F"]:
            zeros = jnp.zeros((len(images), num_cells, num_features(model, options)), jnp.float32)
            return jax.lax.fori_loop(0, options.valid_patches, add_patch, zeros) / (options.valid_patches // num_cells)

        views = [mean_over_patches()] if options.has_patches else []
        views += [encode(_whole_image(images, patches), options.cells)] if options.has_whole_image else []
        return join_cells(jnp.concatenate(views, axis=1), model, options)

    copied, split = replicated(mesh), split_images(mesh)
    return jax.jit(embed, in_shardings=(copied, copied, split, split), out_shardings=split)


def embedding_dim(config: Config) -> int:
    """E, the dimension of embeddings."""
    num_cells = (config.evaluation.has_patches + config.evaluation.has_whole_image) * config.evaluation.cells**2
    cells = jax.ShapeDtypeStruct((1, num_cells, num_features(config.model, config.evaluation)), jnp.float32)
    return jax.eval_shape(lambda cells: join_cells(cells, config.model, config.evaluation), cells).shape[1]


def num_features(model: ModelConfig, options: EmbeddingConfig) -> int:
    """F, the number of features of a cell."""
    dims = {"hidden": model.hidden_dim, "stages": sum(stage_dims(model))}
    return sum(dims[layer] for layer in options.embedded_layer.split("+"))


def join_cells(cells: Float[Array, "B K F"], model: ModelConfig, options: EmbeddingConfig) -> Float[Array, "B E"]:
    """The features of all cells, concatenated; with "stages+hidden", the mean of their hidden features comes last."""
    if options.embedded_layer != "stages+hidden":
        return cells.reshape(len(cells), -1)
    stages, hidden = jnp.split(cells, [sum(stage_dims(model))], axis=-1)
    return jnp.concatenate([stages.reshape(len(cells), -1), jnp.mean(hidden, axis=1)], axis=1)


def _patch_maker(patches: PatchConfig, options: EmbeddingConfig, key: Key[Array, ""]) -> MakePatch:
    """The function (images, indices, number) -> the patch with that number, of each image."""
    crops, grid_side = patches.crops, options.grid_side

    def random_patch(
        images: UInt8[Array, "B H W 3"], indices: Int[Array, " B"], number: Int[Array, ""]
    ) -> Float[Array, "B size size 3"]:
        return multi_patch(key, images, 1, indices=indices, first_patch=number, **crops)[:, 0]

    def crop_of_grid(
        images: UInt8[Array, "B H W 3"], indices: Int[Array, " B"], number: Int[Array, ""]
    ) -> Float[Array, "B size size 3"]:
        plain = {name: crops[name] for name in ("patch_area", "patch_size", "interpolation")}
        return grid_patch(images, number, grid_side, **plain)

    return random_patch if options.valid_crops == "random" else crop_of_grid


def _whole_image(images: UInt8[Array, "B H W 3"], config: PatchConfig) -> Float[Array, "B side side 3"]:
    """The whole images, resized to `whole_image_size`."""
    size = whole_image_size(images.shape[1], config)
    return grid_patch(images, 0, 1, patch_area=1.0, patch_size=size, interpolation=config.interpolation)


def whole_image_size(image_side: int, config: PatchConfig) -> int:
    """Side in pixels of a whole image that is enlarged as much as the crops of patches are."""
    crop = crop_side(image_side, config.patch_area)
    return max(config.patch_size, round(image_side * config.patch_size / crop))


def cell_of(number: Int[Array, ""] | int, options: EmbeddingConfig) -> Int[Array, ""] | int:
    """The cell that contains the grid's crop with this number; crops and cells are numbered row by row."""
    if options.cells == 1:
        return 0
    grid_side = options.grid_side
    row, column = (i * options.cells // grid_side for i in (number // grid_side, number % grid_side))
    return row * options.cells + column


def embed_datasets(config: Config, encoder_state: EncoderState, datasets: Datasets, mesh: Mesh) -> Embeddings:
    """Embeddings of the bank and of the test images; see `embed_images` for the errors raised."""
    embed, options = make_embed(config, mesh), config.evaluation
    return Embeddings(
        *(embed_split(embed, encoder_state, images, options, mesh, split) for split, images in datasets.embedded)
    )


def needs_mirrored(options: EvaluationConfig, split: Split) -> bool:
    """Whether a measure takes the mirrored images of a split. Of the test images, only logistic regression does."""
    return options.mirror and (split == "train" or options.logistic)


def embed_split(
    embed: Embed,
    encoder_state: EncoderState,
    images: ImageDataset,
    options: EvaluationConfig,
    mesh: Mesh,
    name: Split,
    known: LabelledEmbeddings | None = None,
    save: Callable[[LabelledEmbeddings], object] = lambda split: None,
) -> LabelledEmbeddings:
    """Embeddings of all images of a split and, if `needs_mirrored`, of the mirrored images. Known ones are kept.

    `save` is called with the embeddings of the images, and again with those of the mirrored images too, once computed.
    """
    arguments = batch_size_of(options, mesh), mesh
    if known is None:
        known = embed_dataset(embed, encoder_state, images, *arguments, name)
        save(known)
    if needs_mirrored(options, name) and known.mirrored is None:
        mirrored = embed_dataset(embed, encoder_state, images.mirrored(), *arguments, f"mirrored {name}")
        known = known._replace(mirrored=mirrored.embeddings)
        save(known)
    return known


def batch_size_of(options: EvaluationConfig, mesh: Mesh) -> int:
    """Images to embed at a time, over all devices: the option's number or its default.

    An H200 embeds 1.4 times as many patches a second with 1,000 images at a time as with 250. On CPU, small batches
    show progress sooner.
    """
    by_default = 250 if mesh.devices.flat[0].platform == "cpu" else 1000 * mesh.size
    return options.embedding_batch_size or by_default


def embed_dataset(
    embed: Embed, encoder_state: EncoderState, dataset: ImageDataset, batch_size: int, mesh: Mesh, name: str
) -> LabelledEmbeddings:
    """Embeddings of all images of a data set, on each process, with a progress bar; `embed_images` names the error."""
    indices = np.arange(len(dataset.images), dtype=np.int32)
    with image_progress(f"embedding {name}", len(indices)) as bar:
        embeddings = embed_images(
            embed, encoder_state, dataset.images.__getitem__, indices, batch_size, mesh, bar.update
        )
    return LabelledEmbeddings(embeddings, dataset.labels, dataset.class_names, dataset.names)


def embed_images(
    embed: Embed,
    encoder_state: EncoderState,
    images_at: Callable[[Int[np.ndarray, " K"]], UInt8[np.ndarray, "K H W 3"]],
    indices: Int32[np.ndarray, " N"],
    batch_size: int,
    mesh: Mesh,
    progress: Callable[[int], object] | None = None,
) -> Float32[np.ndarray, "N E"]:
    """Embeddings of images, batch by batch, on each process.

    The last batch is padded with the first images; the padding's embeddings are dropped.

    Args:
        embed: see `make_embed`.
        encoder_state: the encoder's parameters and BatchNorm statistics.
        images_at: returns the images at positions from 0 to N-1.
        indices: each image's index in the data set, which decides its random patches.
        batch_size: images at a time, over all devices. A smaller number of images is padded to a power of two instead,
            which keeps the number of sizes to compile small.
        mesh: the devices.
        progress: called with the number of images done since the last call.

    Raises:
        DivergenceError: an embedding is not finite, because training went wrong.
    """
    size = len(indices)
    batch_size = -(-min(batch_size, 1 << (size - 1).bit_length()) // mesh.size) * mesh.size
    rows = own_rows(mesh, batch_size)
    for start in range(0, size, batch_size):
        positions, num_kept = (start + rows) % size, min(batch_size, size - start)
        batch = (rows_to_devices(own, mesh, batch_size) for own in (images_at(positions), indices[positions]))
        embedded = to_host(embed(encoder_state, *batch))[:num_kept]
        if not np.isfinite(embedded).all():
            raise DivergenceError(
                "The embeddings are not all finite: train again with a lower --learning-rate, or choose an earlier "
                "checkpoint with --step."
            )
        if start == 0:
            embeddings = np.empty((size, embedded.shape[1]), np.float32)
        embeddings[start : start + num_kept] = embedded
        if progress is not None:
            progress(num_kept)
    return embeddings
