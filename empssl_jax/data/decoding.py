"""Encoded images to RGB pixels: any mode, turned as EXIF says, of the size that is asked for."""

import contextlib
import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8

from empssl_jax.config.errors import one_line


class UnreadableError(ValueError):
    """An image that cannot be decoded; its message is the reason, in a few words."""


def decode(encoded: bytes | Path, side: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image of a format that PIL knows, of 8 or 16 bits; transparency is dropped.

    Args:
        encoded: the content of a file, or its path.
        side: if given, the largest square in the centre is resized to so many pixels.

    Raises:
        UnreadableError: it is damaged, of an unknown format, or of no 8 or 16 bits.
    """
    try:
        with PIL.Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            if side is not None:
                # A JPEG file is decoded at a half, quarter or eighth of its size where that is still twice what is
                # needed, which takes a fraction of the time.
                image.draft(None, (2 * side, 2 * side))
            image.load()
            with contextlib.suppress(Exception):  # an image whose EXIF data are damaged stays as it is
                PIL.ImageOps.exif_transpose(image, in_place=True)
            return to_pixels(image, side)
    except Exception as error:  # PIL's decoders fail each in their own ways
        reason = "no known format" if isinstance(error, PIL.UnidentifiedImageError) else one_line(error)
        raise UnreadableError(reason) from error


def to_pixels(image: PIL.Image.Image, side: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """An image of 8 or 16 bits as RGB; with a side, the largest square in its centre, resized to so many pixels.

    Raises:
        ValueError: it is of no 8 or 16 bits.
    """
    rgb = _to_rgb(image)
    if side is not None and rgb.size != (side, side):
        rgb = PIL.ImageOps.fit(rgb, (side, side), PIL.Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError(f"its mode is {image.mode}, not of 8 or 16 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
