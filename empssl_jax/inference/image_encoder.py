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
    """A trained encoder; `empssl_jax.load` makes it.

    Attributes:
        config: that of the run.
        state: parameters and BatchNorm statistics, on all devices.
        step: the checkpoint's.
        image_size: side in pixels of the training images.
    """

    def __init__(self, config: Config, state: EncoderState, step: int, image_size: int):
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
        """Embeddings of images, the same each time: image 0 gets the random patches of a data set's image 0, and so on.

        Images of another size than the training images are resized, so that the shorter side fits, and the middle is
        cut out. Those of a data set get the embeddings that eval.py computes, bit for bit, in the same order. A batch
        has the run's `embedding_batch_size`, or for fewer images a power of two of them; each size is compiled once.

        Args:
            images: uint8 arrays, (N, H, W, 3) or a list of (H, W), (H, W, 3) and (H, W, 4) of any sizes; the list may
                hold PIL images too. Gray ones are repeated, transparency is dropped.
            patches: patches averaged into an embedding; by default as many as in the run's evaluation.
            indices: numbers that the random patches of each image are drawn by, in place of 0 to N-1.
            progress: called with the number of images done since the last call, as the `update` of a tqdm.

        Raises:
            UserError: something is no such image, or `patches` is no number of them.
        """
        evaluation = self.config.evaluation
        if patches is not None:
            evaluation = dataclasses.replace(evaluation, valid_patches=patches)
        require(evaluation.valid_patches > 0, "valid_patches", 0, "give the number of patches to embed, as 128")
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
                f"Image {position} is of {kind} ({one_line(error)}): give uint8 arrays (H, W, 3) or PIL images."
            ) from error


def to_square(image: Image, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """An image as RGB, resized so that its shorter side fits, and cut to its middle.

    Raises:
        TypeError, ValueError, AttributeError: it is neither an array of 8-bit pixels nor an image of PIL of 8 or 16.
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
    """The encoder of a run of train.py, which may be going on.

    Args:
        workdir: folder of the run; nothing is written to it.
        step: checkpoint to restore: its step, or the newest, or ("best") the one with the lowest loss.
        evaluation: options of `EvaluationConfig` that say how it embeds, in place of the run's.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged, or an option has a wrong value.
    """
    folder = Path(workdir)
    config, state, restored = restore_encoder(folder, step)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **evaluation))
    return ImageEncoder(config, state, restored, load_image_size(folder))
