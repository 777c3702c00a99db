"""Decoding of image files: EXIF orientation, cropping, resizing and errors."""

import io

import numpy as np
import PIL.Image
import pytest

from empssl_jax.data.decoding import UnreadableError, decode

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 9, 3)).astype(np.uint8)


def encoded(image, kind, **options) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without fine detail. Resizing it hardly depends on the filter."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(6 * x / width), np.cos(5 * y / height), np.sin(4 * x / width + 3 * y / height)]
    return np.uint8(128 + 100 * np.stack(waves, axis=-1))


# The displayed image for each orientation in the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_exif_orientation_is_applied(kind, orientation, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PIXELS, kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    stored = PIXELS if kind != "jpeg" else np.asarray(PIL.Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decode(content, None), UPRIGHT[orientation](stored))
    (tmp_path / "file").write_bytes(content)
    np.testing.assert_array_equal(decode(tmp_path / "file", None), UPRIGHT[orientation](stored))


def test_damaged_exif_data_leave_an_image_as_it_is():
    content = encoded(PIXELS, "png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    np.testing.assert_array_equal(decode(content, None), PIXELS)


def test_sixteen_bits_keep_their_high_byte():
    deep = np.random.RandomState(0).randint(0, 2**16, (8, 8)).astype(np.uint16)
    np.testing.assert_array_equal(decode(encoded(deep, "png"), None), np.repeat(deep[..., None] // 256, 3, axis=2))


def test_the_centre_is_kept_and_enlarged_or_reduced():
    bands = np.zeros((20, 60, 3), np.uint8)
    bands[:, :20, 0] = bands[:, 20:40, 1] = bands[:, 40:, 2] = 200
    for side in (7, 20, 50):
        for image in (bands, bands.transpose(1, 0, 2)):
            out = decode(encoded(image, "png"), side)
            assert out.shape == (side, side, 3)
            inner = out[side // 5 : -(side // 5), side // 5 : -(side // 5)]
            assert np.abs(inner.astype(int) - [0, 200, 0]).max() <= 3  # a cubic filter overshoots near edges


@pytest.mark.parametrize(("height", "width"), [(600, 800), (801, 333), (97, 130), (40, 50)])
def test_large_jpeg_files_that_are_decoded_in_part_look_the_same(height, width):
    image = smooth(height, width)
    shorter = min(height, width)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    square = PIL.Image.fromarray(image[top : top + shorter, left : left + shorter])
    expected = np.asarray(square.resize((64, 64), PIL.Image.Resampling.BILINEAR), np.float64)
    difference = np.abs(decode(encoded(image, "jpeg", quality=95), 64) - expected)
    assert difference.mean() < 2
    assert difference.max() < 12


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no known format"),
        (b"nonsense", "no known format"),
        (encoded(smooth(99, 99), "jpeg")[:700], "truncated"),
        (encoded(np.eye(8, dtype=np.float32), "tiff"), "its mode is F instead of 8 or 16 bits"),
    ],
)
@pytest.mark.parametrize("side", [None, 8])
def test_what_cannot_be_decoded_says_why(content, reason, side):
    with pytest.raises(UnreadableError, match=reason):
        decode(content, side)


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(UnreadableError, match="No such file"):
        decode(tmp_path / "none.png", None)
