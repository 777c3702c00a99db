"""Decodes images to RGB pixels, as a viewer shows them: of any mode, rotated as EXIF says, and resized on request."""

import errno
import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8
from PIL.Image import Transpose

from empssl_jax.config.errors import UserError, one_line
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
# Errors of files that stay as they are: links that lead nowhere, and damaged files that point outside themselves.
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)


class UnreadableError(ValueError):
    """An image cannot be decoded. The message is the reason in a few words."""


def decode(encoded: bytes | Path, side: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an encoded image: `to_pixels` of the image that PIL opens.

    Args:
        encoded: the content of a file, or its path.
        side: see `to_pixels`.

    Raises:
        UnreadableError: the image is damaged, its format is unknown, or it is not of 8 or 16 bits.
        OSError, MemoryError: it cannot be read now, and may be intact.
    """
    try:
        image = PIL.Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
    except Exception as error:  # each of PIL's formats raises its own errors
        if _may_pass(error):
            raise
        reason = "no known format" if isinstance(error, PIL.UnidentifiedImageError) else one_line(error)
        raise UnreadableError(reason) from error
    with image:
        return to_pixels(image, side)


def decode_or_reason(encoded: bytes | Path, side: int | None) -> UInt8[np.ndarray, "H W 3"] | UnreadableError:
    """The pixels as `decode` returns them, or the error that it raises for an image that cannot be decoded.

    Raises:
        UserError: the image cannot be read now. To skip it would leave out an intact image.
    """
    try:
        return decode(encoded, side)
    except UnreadableError as reason:
        return reason
    except (OSError, MemoryError) as error:
        name = one_line(str(encoded)) if isinstance(encoded, Path) else "An image"
        cause = error.strerror if isinstance(error, OSError) else "out of memory"
        raise UserError(
            f"{name} cannot be read ({cause}): fix this and give the same command again, or remove the file."
        ) from error


def _may_pass(error: Exception) -> bool:
    """Whether the error may have another cause than the content of the file. PIL's own OSErrors have no errno."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, *LASTING))


def to_pixels(image: PIL.Image.Image, side: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image of 8 or 16 bits, rotated as its EXIF data says. Transparency is dropped.

    Args:
        image: an image of any mode; it is not changed.
        side: resize the largest square in the centre to this side in pixels; None keeps the image as it is.

    Raises:
        UnreadableError: the image is damaged, empty, or not of 8 or 16 bits.
        OSError, MemoryError: see `decode`.
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
        if _may_pass(error):
            raise
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
