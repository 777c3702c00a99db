"""The pictures of the report: training patches, thumbnails, and images as data URIs."""

import base64
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Int, UInt8

from empssl_jax.config import Config
from empssl_jax.data.batches import shuffled_batches
from empssl_jax.data.datasets import ImageDataset
from empssl_jax.method.patches import multi_patch
from empssl_jax.method.random_keys import training_patches_key

SHEET_IMAGES = 6
SHEET_PATCHES = 10
THUMBNAIL_SIDE = 64  # largest side of a thumbnail in pixels
SPRITE_SIDE = 40  # the same in a sprite, which may have a thousand

Picture = UInt8[np.ndarray, "H W 3"]


class PatchSheet(NamedTuple):
    """The first images of the first step and the first of their patches."""

    indices: Int[np.ndarray, " B"]  # of the images in the data set
    images: list[Picture]
    patches: UInt8[np.ndarray, "B P size size 3"]


def training_patches(config: Config, dataset: ImageDataset) -> PatchSheet:
    """Patches that the network saw in its first step, made again from the same images, indices and keys."""
    training, patches = config.training, config.patches
    batch = next(shuffled_batches(dataset, training.batch_size, training.seed, 0, 1))
    indices = np.asarray(batch.indices)[:SHEET_IMAGES]
    images = np.asarray(batch.images)[:SHEET_IMAGES]

    @jax.jit
    def make(images: UInt8[Array, "B H W 3"], indices: Int[Array, " B"]) -> Float[Array, "B P size size 3"]:
        return multi_patch(
            training_patches_key(training.seed, 0),
            images,
            min(SHEET_PATCHES, patches.train_patches),
            indices=indices,
            **patches.crops,
        )

    made = np.asarray(make(images, indices))
    pixels = np.clip(np.round((made + 1) * 127.5), 0, 255).astype(np.uint8)
    return PatchSheet(indices, [*images], _shrink(pixels))


def _shrink(patches: UInt8[np.ndarray, "B P size size 3"]) -> UInt8[np.ndarray, "B P side side 3"]:
    flat = np.stack([thumbnail(patch) for patch in patches.reshape(-1, *patches.shape[2:])])
    return flat.reshape(*patches.shape[:2], *flat.shape[1:])


def thumbnail(image: Picture, side: int = THUMBNAIL_SIDE) -> Picture:
    """Shrinks an image to at most `side` pixels in width and height."""
    shrunk = PIL.Image.fromarray(image)
    shrunk.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    return np.asarray(shrunk)


def data_uri(image: Picture, exact: bool = False) -> str:
    """An image as a data URI, which embeds it in a page: a PNG if exact, else a JPEG, which is a quarter as large."""
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded(image, exact)).decode()}"


def encoded(image: Picture, exact: bool) -> bytes:
    """An image as the bytes of a PNG file if exact, else of a JPEG file."""
    file = io.BytesIO()
    options: dict[str, int] = {} if exact else {"quality": 85, "subsampling": 0}
    PIL.Image.fromarray(image).save(file, "PNG" if exact else "JPEG", **options)
    return file.getvalue()


class Sprite(NamedTuple):
    """Many thumbnails in one picture, row by row."""

    picture: Picture
    side: int  # of a thumbnail's cell, in pixels
    columns: int


def sprite(images: Sequence[Picture]) -> Sprite:
    """Arranges thumbnails of images in a nearly square grid, each centred in a square cell."""
    thumbnails = [thumbnail(image, SPRITE_SIDE) for image in images]
    side = max(max(image.shape[:2]) for image in thumbnails)
    columns = math.ceil(math.sqrt(len(thumbnails)))
    grid = np.zeros((math.ceil(len(thumbnails) / columns) * side, columns * side, 3), np.uint8)
    for i, image in enumerate(thumbnails):
        top = i // columns * side + (side - image.shape[0]) // 2
        left = i % columns * side + (side - image.shape[1]) // 2
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Sprite(grid, side, columns)


def as_grid(patches: UInt8[np.ndarray, "B P size size 3"]) -> Picture:
    """Patches in one picture: one row per image, one column per patch, separated by a gray pixel."""
    framed = np.pad(patches, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    rows, columns, side = framed.shape[:3]
    return framed.swapaxes(1, 2).reshape(rows * side, columns * side, 3)[:-1, :-1]
