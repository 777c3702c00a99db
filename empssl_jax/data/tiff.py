"""Pixels of TIFF files that PIL reads wrongly without an error, or leaves to its users to convert."""

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    YCBCRSUBSAMPLING,
    TiffImageFile,
)

WHITE_IS_ZERO, RGB, YCBCR = 0, 2, 6  # values of PHOTOMETRIC_INTERPRETATION
SEPARATE = 2  # value of PLANAR_CONFIGURATION: each channel is stored by itself
UNSIGNED = 1  # value of SAMPLEFORMAT


def gray_scale(image: PIL.Image.Image) -> UInt8[np.ndarray, "H W"]:
    """The high bytes of an image of one channel and 16 bits, or of 12 bits in a TIFF file; white is 255."""
    levels = np.asarray(image)
    if not isinstance(image, TiffImageFile):
        return (levels >> 8).astype(np.uint8)
    tags = image.tag_v2
    levels = (levels >> (4 if tags.get(BITSPERSAMPLE) == (12,) else 8)).astype(np.uint8)
    # PIL inverts images of up to 8 bits, and leaves this to its users for 16 bits.
    return 255 - levels if _photometric(image) == WHITE_IS_ZERO else levels


def check_tiff(image: PIL.Image.Image) -> None:
    """Raises ValueError if the image is from a TIFF file whose pixels PIL reads wrongly."""
    if not isinstance(image, TiffImageFile):
        return
    tags, photometric, is_raw = image.tag_v2, _photometric(image), image.info.get("compression") == "raw"
    if image.mode == "L" and max(tags.get(SAMPLEFORMAT, (UNSIGNED,))) != UNSIGNED:
        raise ValueError("its pixels are signed numbers")
    if photometric == YCBCR and is_raw and tags.get(YCBCRSUBSAMPLING, (2, 2)) != (1, 1):
        raise ValueError("its colours are subsampled but not compressed")
    if tags.get(PLANAR_CONFIGURATION) == SEPARATE and (channels := tags.get(SAMPLESPERPIXEL, 1)) > 1:
        is_unnamed = photometric == RGB and channels > 3 and EXTRASAMPLES not in tags
        if is_unnamed or (is_raw and max(tags.get(BITSPERSAMPLE, (1,))) > 8):
            raise ValueError("its channels are stored separately")


def _photometric(image: TiffImageFile) -> int:
    """What the pixels mean; PIL takes files that do not say so to be WHITE_IS_ZERO."""
    return image.tag_v2.get(PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO)
