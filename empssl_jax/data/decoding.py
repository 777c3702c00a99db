"""Decodes images to RGB pixels, as a viewer shows them: of any mode, rotated as EXIF says, and resized on request."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8
from PIL.Image import Transpose

from empssl_jax.config.errors import one_line
from empssl_jax.data.tiff import check_tiff, gray_scale

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class UnreadableError(ValueError):
    """An image cannot be decoded. The message is the reason in a few words."""


def decode(encoded: bytes | Path, side: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an encoded image: `to_pixels` of the image that PIL opens.

    Args:
        encoded: the content of a file, or its path.
        side: see `to_pixels`.

    Raises:
        UnreadableError: the image is damaged, its format is unknown, or it is not of 8 or 16 bits.
    """
    try:
        image = PIL.Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
    except Exception as error:  # each of PIL's formats raises its own errors
        reason = "no known format" if isinstance(error, PIL.UnidentifiedImageError) else one_line(error)
        raise UnreadableError(reason) from error
    with image:
        return to_pixels(image, side)


def decode_or_reason(encoded: bytes | Path, side: int | None) -> UInt8[np.ndarray, "H W 3"] | UnreadableError:
    """The pixels as `decode` returns them, or the error that it raises."""
    try:
        return decode(encoded, side)
    except UnreadableError as reason:
        return reason


def to_pixels(image: PIL.Image.Image, side: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image of 8 or 16 bits, rotated as its EXIF data says. Transparency is dropped.

    Args:
        image: an image of any mode; it is not changed.
        side: resize the largest square in the centre to this side in pixels; None keeps the image as it is.

    Raises:
        UnreadableError: the image is damaged, empty, or not of 8 or 16 bits.
    """
    try:
        if 0 in image.size:
            raise ValueError("it has no pixels")
        rgb = _to_rgb(image)
        if (method := UPRIGHT.get(_orientation(image))) is not None:
            rgb = rgb.transpose(method)
        if side is not None and rgb.size != (side, side):
            rgb = PIL.ImageOps.fit(rgb, (side, side), PIL.Image.Resampling.BICUBIC)
        return np.asarray(rgb)
    except Exception as error:  # each of PIL's decoders raises its own errors
        raise UnreadableError(one_line(error)) from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    image.load()
    check_tiff(image)
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray(gray_scale(image))
    if image.mode[0] in "IF":
        raise ValueError(f"its mode is {image.mode} instead of 8 or 16 bits")
    if "transparency" in image.info:  # PIL cannot convert every kind of it
        image = image.copy()
        del image.info["transparency"]
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: PIL.Image.Image) -> int:
    """The orientation of the stored pixels, 1 if they are upright or the EXIF data is damaged."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # PIL raises various errors for damaged data
        return 1
