"""Decoding of image files: EXIF orientation, cropping, resizing and errors."""

import errno
import io
import os
import re
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from empssl_jax.data.decoding import UnreadableError, decode, to_pixels

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
    for side in (None, 4):
        with PIL.Image.open(tmp_path / "file") as opened:
            np.testing.assert_array_equal(to_pixels(opened, side), decode(tmp_path / "file", side))
            np.testing.assert_array_equal(np.asarray(opened), stored)  # not changed
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
def test_large_jpeg_files_are_reduced_as_the_image_that_pil_opens(height, width):
    image = smooth(height, width)
    content = encoded(image, "jpeg", quality=95)
    shorter = min(height, width)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    square = PIL.Image.fromarray(image[top : top + shorter, left : left + shorter])
    expected = np.asarray(square.resize((64, 64), PIL.Image.Resampling.BICUBIC), np.float64)
    difference = np.abs(decode(content, 64) - expected)
    assert difference.mean() < 2
    assert difference.max() < 12
    np.testing.assert_array_equal(to_pixels(PIL.Image.open(io.BytesIO(content)), 64), decode(content, 64))


def png(values: np.ndarray, bits: int, kind: int, palette: bytes = b"", transparency: bytes = b"") -> bytes:
    """A file of values (rows, columns, channels) of PNG's colour type `kind`."""
    rows = [np.unpackbits(row.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, -bits:] for row in values]
    chunks = {b"IHDR": struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, kind, 0, 0, 0)}
    chunks |= {b"PLTE": palette} if palette else {}
    chunks |= {b"tRNS": transparency} if transparency else {}
    chunks |= {b"IDAT": zlib.compress(b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)), b"IEND": b""}
    written = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


GRAY, COLOUR, PALETTE, GRAY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
DEPTHS = {GRAY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8), COLOUR: (8, 16), GRAY_ALPHA: (8, 16), COLOUR_ALPHA: (8, 16)}


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize(("kind", "bits"), [(kind, bits) for kind, depths in DEPTHS.items() for bits in depths])
def test_png_files_of_every_kind_and_depth(kind, bits, transparent):
    """As the standard says: low depths are scaled, and 16 bits keep the high byte. Transparency is dropped."""
    random, channels = np.random.RandomState(0), {COLOUR: 3, GRAY_ALPHA: 2, COLOUR_ALPHA: 4}.get(kind, 1)
    values, palette = random.randint(0, 2**bits, (8, 8, channels)), random.randint(0, 256, (2**bits, 3))
    levels = values * 255 // (2**bits - 1) if bits < 8 else values >> (bits - 8)
    expected = levels[..., :3] if channels > 2 else np.repeat(levels[..., :1], 3, axis=2)
    options = {}
    if kind == PALETTE:
        expected, options["palette"] = palette[values[..., 0]], palette.astype(np.uint8).tobytes()
    if transparent and kind in (GRAY, COLOUR, PALETTE):  # one value, or the alpha of the first entry of the palette
        options["transparency"] = b"\0" if kind == PALETTE else values[0, 0].astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(png(values, bits, kind, **options), None), expected)


RED, GRAY_LEVEL = [255, 0, 0], [0x12] * 3
MODES = {
    "1": (1, [255] * 3),
    "L": (18, GRAY_LEVEL),
    "LA": ((18, 7), GRAY_LEVEL),
    "P": (18, None),
    "PA": ((18, 7), None),
    "RGB": ((255, 0, 0), RED),
    "RGBA": ((255, 0, 0, 7), RED),
    "RGBX": ((255, 0, 0, 7), RED),
    "RGBa": ((51, 0, 0, 51), RED),
    "CMYK": ((0, 255, 255, 0), RED),
    "YCbCr": ((76, 85, 255), RED),
    "HSV": ((0, 255, 255), RED),
    "I;16": (0x1234, GRAY_LEVEL),
    "I;16L": (0x1234, GRAY_LEVEL),
    "I;16B": (0x1234, GRAY_LEVEL),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transparency", [None, 18, b"\0\xff", (255, 0, 0), 70000])
def test_pil_images_of_every_mode(mode, transparency):
    value, expected = MODES[mode]
    image = PIL.Image.new(mode, (3, 2), value)
    if mode in ("P", "PA"):
        image.putpalette([9] * 54 + [1, 2, 3] + [9] * 711)
        expected = [1, 2, 3]
    if transparency is not None:
        image.info["transparency"] = transparency
    pixels = to_pixels(image, None)
    assert pixels.shape == (2, 3, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= (mode == "YCbCr")
    assert image.info.get("transparency") == transparency


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pil_images_of_other_modes_are_refused(mode):
    with pytest.raises(UnreadableError, match=f"its mode is {mode} instead of 8 or 16 bits"):
        to_pixels(PIL.Image.new(mode, (3, 2)), None)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_images_without_pixels_are_refused(size):
    with pytest.raises(UnreadableError, match="it has no pixels"):
        to_pixels(PIL.Image.new("RGB", size), 8)


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


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_links_that_lead_nowhere_cannot_be_decoded(number, tmp_path):
    (tmp_path / "file").write_text("x")
    target = {errno.ENOTDIR: "file/x", errno.ELOOP: "link.png", errno.ENAMETOOLONG: "x" * 300}[number]
    (tmp_path / "link.png").symlink_to(target)
    with pytest.raises(UnreadableError, match=re.escape(os.strerror(number))):
        decode(tmp_path / "link.png", None)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()], ids=["I/O", "memory"])
def test_errors_while_an_intact_file_is_read_are_kept_apart_from_damage(error, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(type(error)) as caught:
        decode(encoded(PIXELS, "png"), None)
    assert caught.value is error


def test_a_damaged_file_that_points_outside_itself_cannot_be_decoded(tmp_path):
    """The system refuses to go to the position of the first directory of this TIFF file."""
    (tmp_path / "file.tif").write_bytes(b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63 - 8))
    with pytest.raises(UnreadableError, match="Invalid argument"):
        decode(tmp_path / "file.tif", None)
