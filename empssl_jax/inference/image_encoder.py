"""A trained encoder to use from Python: images in, embeddings out."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float32, Int, UInt8

from empssl_jax.config import Config
from empssl_jax.config.command_options import CheckpointChoice
from empssl_jax.config.errors import UserError, one_line, require
from empssl_jax.data.decoding import to_pixels
from empssl_jax.evaluation.embeddings import embed_images, embedding_dim, make_embed
from empssl_jax.evaluation.trained_encoder import restore_encoder
from empssl_jax.method.encoder import EncoderState
from empssl_jax.run_folder.saved_config import load_image_size
from empssl_jax.runtime.devices import device_mesh

Image = np.ndarray | PIL.Image.Image


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
        images: UInt8[np.ndarray, "N H W 3"] | Sequence[Image],
        patches: int | None = None,
        *,
        indices: Int[np.ndarray, " N"] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Float32[np.ndarray, "N E"]:
        """Embeds images. Results are reproducible: image i gets the same random patches as image i of a data set.

        If the size of an image differs from that of the training images, its largest central square is resized. For the
        images of a data set, in the same order, the embeddings are bit-identical to those of eval.py. A batch has the
        run's `embedding_batch_size`; fewer images are padded to a power of two. Each batch size is compiled once.

        Args:
            images: uint8, either one array (N, H, W, 3), or a list of arrays (H, W), (H, W, 3) or (H, W, 4) and PIL
                images, of any sizes. Gray images are converted to RGB, transparency is dropped.
            patches: patches averaged into an embedding; by default the `valid_patches` of `config.evaluation`.
            indices: index of each image that decides its random patches, instead of 0 to N-1.
            progress: called with the number of images done since the last call, like tqdm's `update`.

        Raises:
            UserError: an image is of another kind, `patches` is not valid, or the number of `indices` is not N.
        """
        evaluation = self.config.evaluation
        if patches is not None:
            evaluation = dataclasses.replace(evaluation, valid_patches=patches)
        require(evaluation.valid_patches > 0, "valid_patches", 0, "give the number of patches, such as 128")
        indices = np.arange(len(images)) if indices is None else np.asarray(indices)
        if len(indices) != len(images):
            raise UserError(f"There are {len(indices)} indices for {len(images)} images: give one for each.")
        if len(images) == 0:
            return np.zeros((0, embedding_dim(self.config)), np.float32)
        return embed_images(
            make_embed(dataclasses.replace(self.config, evaluation=evaluation), self._mesh),
            self.state,
            lambda positions: np.stack([self._prepare(images[position], position) for position in positions]),
            indices.astype(np.int32),
            evaluation.embedding_batch_size,
            self._mesh,
            progress,
        )

    def _prepare(self, image: Image, position: int) -> UInt8[np.ndarray, "S S 3"]:
        try:
            return to_square(image, self.image_size)
        except (TypeError, ValueError, AttributeError) as error:
            kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise UserError(
                f"Image {position} has type {kind} ({one_line(error)}): give uint8 arrays (H, W, 3) or PIL images."
            ) from error


def to_square(image: Image, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """An image as RGB: the largest square at its centre, resized to `side` pixels.

    Raises:
        TypeError, ValueError, AttributeError: it is neither an array of 8-bit pixels nor a PIL image of 8 or 16 bits.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError("pixels must be uint8 from 0 to 255")
        if image.shape == (side, side, 3):
            return image
        if image.ndim not in (2, 3):
            raise ValueError("it must have rows and columns")
        image = PIL.Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    return to_pixels(image, side)


def load(workdir: str | Path, step: CheckpointChoice = "latest", **evaluation: Any) -> ImageEncoder:
    """Loads the encoder of a run, which may still be training.

    Args:
        workdir: folder of the run; nothing is written to it.
        step: checkpoint to restore: its step, the newest ("latest"), or the one with the lowest loss ("best").
        evaluation: options of `EvaluationConfig` that decide how images are embedded, instead of the run's own.

    Raises:
        UserError: the run or the checkpoint does not exist or is damaged, or an option has a wrong value.
    """
    folder = Path(workdir)
    config, state, restored = restore_encoder(folder, step, "workdir")
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **evaluation))
    return ImageEncoder(config, state, restored, load_image_size(folder))
