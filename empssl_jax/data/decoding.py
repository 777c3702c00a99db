"""Decodes images to RGB pixels: of any mode, rotated as EXIF says, and resized on request."""

import contextlib
import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8

from empssl_jax.config.errors import one_line


class UnreadableError(ValueError):
    """An image cannot be decoded. The message is the reason in a few words."""


def decode(encoded: bytes | Path, side: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image in any of PIL's formats, of 8 or 16 bits; transparency is dropped.

    Args:
        encoded: the content of a file, or its path.
        side: resize the largest square in the centre to this side in pixels; None keeps the image as it is.

    Raises:
        UnreadableError: the image is damaged, its format is unknown, or it is not of 8 or 16 bits.
    """
    try:
        with PIL.Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            if side is not None:
                # Decodes a JPEG file at a half, quarter or eighth of its size, which is faster, if that is still at
                # least twice the side.
                image.draft(None, (2 * side, 2 * side))
            image.load()
            with contextlib.suppress(Exception):  # an image with damaged EXIF data is not rotated
                PIL.ImageOps.exif_transpose(image, in_place=True)
            return to_pixels(image, side)
    except Exception as error:  # each of PIL's decoders raises its own errors
        reason = "no known format" if isinstance(error, PIL.UnidentifiedImageError) else one_line(error)
        raise UnreadableError(reason) from error


def to_pixels(image: PIL.Image.Image, side: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """Converts an image of 8 or 16 bits to RGB; `side` is that of `decode`.

    Raises:
        ValueError: the image is not of 8 or 16 bits.
    """
    rgb = _to_rgb(image)
    if side is not None and rgb.size != (side, side):
        rgb = PIL.ImageOps.fit(rgb, (side, side), PIL.Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError(f"its mode is {image.mode} instead of 8 or 16 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
