"""A trained encoder to use from Python: images in, embeddings out."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float32, Int, Int32, UInt8

from empssl_jax.config import Config, EmbeddingConfig
from empssl_jax.config.checked_fields import expand
from empssl_jax.config.command_options import CheckpointChoice, ImportOptions
from empssl_jax.config.errors import UserError, counted, one_line, require
from empssl_jax.config.pretrained import pretrained_file
from empssl_jax.data.decoding import to_pixels
from empssl_jax.evaluation.embeddings import batch_size_of, embed_images, embedding_dim, make_embed
from empssl_jax.evaluation.trained_encoder import restore_encoder
from empssl_jax.inference.import_weights import read_run
from empssl_jax.method.encoder import EncoderState
from empssl_jax.run_folder.saved_config import load_saved_images
from empssl_jax.runtime.devices import device_mesh, replicated

Image = np.ndarray | jax.Array | PIL.Image.Image
ACCEPTED = "a list of uint8 arrays (H, W, 3) and PIL images, or a uint8 array (N, H, W, 3)"
CHANNELS = 4  # at most, in an array of one image; more are the columns of a stack of gray images
CHANNELS_FIRST = (3, 4)  # numbers of gray images that are refused as an array, since PyTorch's images have these shapes
MAX_INDEX = 2**31 - 1
OPTIONS = (*(field.name for field in dataclasses.fields(EmbeddingConfig)), "embedding_batch_size")  # that `load` takes


class ImageEncoder:
    """A trained encoder, as `empssl_jax.load` returns it.

    Attributes:
        config: the run's config.
        state: parameters and BatchNorm statistics, replicated over all devices.
        step: the checkpoint's step.
        image_size: side of the training images in pixels.
    """

    def __init__(self, config: Config, state: EncoderState, step: int, image_size: int) -> None:
        self.config, self.state, self.step, self.image_size = config, state, step, image_size
        self._mesh = device_mesh()

    def embed(
        self,
        images: UInt8[np.ndarray, "N H W 3"] | Iterable[Image] | Image,
        patches: int | None = None,
        *,
        indices: Int[np.ndarray, " N"] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Float32[np.ndarray, "N E"]:
        """Embeds images. Results are reproducible: image i gets the same random patches as image i of a data set.

        PIL images are rotated as their EXIF data says. If the size of an image differs from that of the training
        images, its largest central square is resized. For the images of a data set, in the same order, the embeddings
        are bit-identical to those of `empssl eval`. A batch has the run's `embedding_batch_size`; fewer images are
        padded to a power of two. Each batch size is compiled once.

        Args:
            images: uint8, either one array (N, H, W, 3), or a list or generator of arrays (H, W), (H, W, 3) or
                (H, W, 4) and PIL images, of any sizes; or one such image, which gives one embedding. Arrays may be
                NumPy's or JAX's. Gray images are converted to RGB, transparency is dropped.
            patches: patches averaged into an embedding; by default the `valid_patches` of `config.evaluation`.
            indices: index of each image that decides its random patches, from 0 to 2**31 - 1, instead of 0 to N-1.
            progress: called with the number of images done since the last call, like tqdm's `update`.

        Raises:
            UserError: an image is of another kind or damaged, or `patches` or `indices` are not valid.
            DivergenceError: an embedding is not finite, because training went wrong.
        """
        evaluation = self.config.evaluation
        if patches is not None:
            evaluation = dataclasses.replace(evaluation, valid_patches=patches)
        evaluation.require_patches()
        listed = _listed(images)
        positions = np.arange(len(listed), dtype=np.int32) if indices is None else _checked(indices, len(listed))
        if len(listed) == 0:
            return np.zeros((0, embedding_dim(self.config)), np.float32)
        return embed_images(
            make_embed(dataclasses.replace(self.config, evaluation=evaluation), self._mesh),
            self.state,
            lambda numbers: np.stack([self._prepare(listed[number], number) for number in numbers]),
            positions,
            batch_size_of(evaluation, self._mesh),
            self._mesh,
            progress,
        )

    def _prepare(self, image: Any, number: int) -> UInt8[np.ndarray, "S S 3"]:
        try:
            return to_square(image, self.image_size)
        except (TypeError, ValueError) as error:
            kind = f"{image.dtype} {image.shape}" if hasattr(image, "__array__") else type(image).__name__
            raise UserError(
                f"Image {number} has type {kind} ({one_line(error)}): give uint8 arrays (H, W, 3) or PIL images."
            ) from error


def _listed(images: Any) -> Sequence[Image]:
    """The images in a sequence; one image becomes a sequence of one."""
    if isinstance(images, PIL.Image.Image):
        return [images]
    try:
        if not hasattr(images, "__array__"):
            if isinstance(images, str | bytes):
                raise TypeError("a name is not an image")
            return images if isinstance(images, Sequence) else list(images)
        array: Any = np.asarray(images)
        if array.ndim == 0:
            raise TypeError("it has no rows and columns")
    except TypeError as error:
        raise UserError(f"images is {type(images).__name__} ({one_line(error)}): give {ACCEPTED}.") from error
    if array.ndim == 3 and len(array) in CHANNELS_FIRST and array.shape[2] > CHANNELS:
        raise UserError(
            f"images has shape {array.shape}, which may be gray images or one image with its channels first: give "
            "list(images) for gray images, or an array (H, W, 3) for one image."
        )
    is_one = array.ndim == 2 or (array.ndim == 3 and array.shape[2] <= CHANNELS)
    return array[None] if is_one else array


def _checked(indices: object, size: int) -> Int32[np.ndarray, " N"]:
    """The indices of `size` images; raises UserError unless they are that many whole numbers from 0 to MAX_INDEX."""
    try:
        array = np.asarray(indices)
    except ValueError:  # lists of several lengths
        array = np.asarray(None)
    if array.ndim == 1 and len(array) != size:
        raise UserError(f"indices has length {len(array)} for {counted(size, 'image')}: give one for each.")
    is_valid = array.ndim == 1 and (
        size == 0 or (array.dtype.kind in "iu" and 0 <= array.min() <= array.max() <= MAX_INDEX)
    )
    if not is_valid:
        raise UserError(f"indices is {one_line(indices)}: give a list of whole numbers from 0 to {MAX_INDEX}.")
    return array.astype(np.int32)


def to_square(image: Image, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """An image as RGB: the largest square at its centre, resized to `side` pixels.

    Raises:
        TypeError, ValueError: it is neither an array of 8-bit pixels nor a PIL image of 8 or 16 bits.
    """
    if isinstance(image, PIL.Image.Image):
        return to_pixels(image, side)
    if not hasattr(image, "__array__"):
        raise TypeError("it is not an image")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError("pixels must be uint8 from 0 to 255")
    if pixels.shape == (side, side, 3):
        return pixels
    if pixels.ndim not in (2, 3):
        raise ValueError("it must have rows and columns")
    return to_pixels(PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels), side)


def load(workdir: str | Path, step: CheckpointChoice = "latest", **options: Any) -> ImageEncoder:
    """Loads the encoder of a run, which may still be training, or one that comes with the package.

    Args:
        workdir: folder of the run, which may begin with ~; nothing is written to it. Or "cifar10-small", see
            docs/usage.md.
        step: checkpoint to restore: its step, the newest ("latest"), or the one with the lowest loss ("best").
        options: `embedding_batch_size` or fields of `EmbeddingConfig`, instead of those of the run's evaluation.

    Raises:
        UserError: the run or the checkpoint does not exist or is damaged, there is no such option, or it has a wrong
            value.
    """
    _check_names(options)
    if pretrained_file(workdir):
        return _load_pretrained(str(workdir), step, options)
    folder = Path(expand(str(workdir)))
    config, state, restored = restore_encoder(folder, step, "workdir")
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **options))
    return ImageEncoder(config, state, restored, load_saved_images(folder).size)


def _check_names(options: dict[str, Any]) -> None:
    """Raises UserError unless `load` takes options with these names."""
    for name in options.keys() - set(OPTIONS):
        remedy = f"give some of {', '.join(OPTIONS)}"
        if name == "whiten":
            remedy = "whiten embeddings with empssl_jax.evaluation.whitening.whiten"
        raise UserError(f"load has no option {name}: {remedy}.")


def _load_pretrained(name: str, step: CheckpointChoice, options: dict[str, Any]) -> ImageEncoder:
    """The ResNet of the encoder with this name; its heads, which nothing uses, are zeros."""
    config, state, image_size, _ = read_run(ImportOptions(name, workdir=name, fresh_heads=True), draw_heads=False)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **options))
    require(step in ("latest", "best"), "step", step, f"{name} has one checkpoint, so leave it out")
    layer = config.evaluation.embedded_layer
    require(layer == "stages", "embedded_layer", layer, f"{name} is a ResNet without a hidden layer, so give stages")
    return ImageEncoder(config, jax.device_put(state, replicated(device_mesh())), 0, image_size)
