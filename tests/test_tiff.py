"""TIFF files written here byte by byte have the pixels that a viewer shows, or cannot be decoded."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from empssl_jax.data.decoding import UnreadableError, decode, to_pixels

SIDE = 8
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
RAW, DEFLATE = 1, 8
ORDERS, COMPRESSIONS = pytest.mark.parametrize("order", "<>"), pytest.mark.parametrize("compression", [RAW, DEFLATE])


def tiff(
    values: np.ndarray, bits: int, order: str = "<", compression: int = RAW, planar: bool = False, **tags
) -> bytes:
    """A file of values (rows, columns, channels), with the tags `t262=[1]` and so on; `t262` is photometric."""
    height, width, channels = values.shape
    planes = [values[..., [channel]] for channel in range(channels)] if planar else [values]
    strips = [packed(plane, bits, order) for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if compression == DEFLATE else strips
    fields = {256: [width], 257: [height], 258: [bits] * channels, 259: [compression], 277: [channels], 278: [height]}
    fields |= {273: [0] * len(strips), 279: [len(strip) for strip in strips], 284: [2 if planar else 1]}
    fields |= {int(name[1:]): value for name, value in tags.items()}
    room = 14 + 12 * len(fields)
    lists = {tag: struct.pack(f"{order}{len(numbers)}I", *numbers) for tag, numbers in fields.items()}
    start = room + sum(len(content) for content in lists.values() if len(content) > 4)
    lists[273] = struct.pack(f"{order}{len(strips)}I", *(start + sum(map(len, strips[:i])) for i in range(len(strips))))
    directory, tail = b"", b""
    for tag, content in sorted(lists.items()):
        directory += struct.pack(f"{order}HHI", tag, 4, len(content) // 4)
        directory += content if len(content) == 4 else struct.pack(f"{order}I", room + len(tail))
        tail += content if len(content) > 4 else b""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(lists))
    return head + directory + bytes(4) + tail + b"".join(strips)


def packed(values: np.ndarray, bits: int, order: str) -> bytes:
    """The rows as bytes, `bits` a value, each row from a new byte."""
    if bits % 8 == 0:
        return values.astype(f"{order}u{bits // 8}").tobytes()
    rows = (values.reshape(len(values), -1, 1) >> np.arange(bits)[::-1]) & 1
    return np.packbits(rows.reshape(len(values), -1), axis=1).tobytes()


def random(bits: int, channels: int = 1) -> np.ndarray:
    return np.random.RandomState(bits + channels).randint(0, 2**bits, (SIDE, SIDE, channels), dtype=np.int64)


def shown(content: bytes) -> np.ndarray:
    """The pixels of a file, the same from its bytes and from the image that PIL opens."""
    pixels = decode(content, None)
    np.testing.assert_array_equal(to_pixels(PIL.Image.open(io.BytesIO(content)), None), pixels)
    return pixels


def in_eight_bits(values: np.ndarray, bits: int) -> np.ndarray:
    return values * 255 // (2**bits - 1) if bits < 8 else values >> (bits - 8)


@COMPRESSIONS
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO, None])
@pytest.mark.parametrize(
    ("bits", "order"), [(1, "<"), (1, ">"), (2, "<"), (4, ">"), (8, "<"), (8, ">"), (16, "<"), (16, ">")]
)
def test_gray_levels_of_any_depth(bits, order, photometric, compression):
    values = random(bits)
    content = tiff(values, bits, order, compression, **({} if photometric is None else {"t262": [photometric]}))
    if (bits, order) == (16, ">") and photometric != BLACK_IS_ZERO:
        with pytest.raises(UnreadableError, match="no known format"):
            decode(content, None)
        return
    levels = in_eight_bits(values, bits)
    expected = levels if photometric == BLACK_IS_ZERO else 255 - levels
    np.testing.assert_array_equal(shown(content), np.repeat(expected, 3, axis=2))


def test_a_ramp_of_sixteen_bits_whose_white_is_zero_falls():
    ramp = np.linspace(0, 65535, SIDE).astype(np.int64)[None, :, None]
    assert shown(tiff(ramp, 16, t262=[WHITE_IS_ZERO]))[0, :, 0].tolist() == [255, 219, 182, 146, 109, 73, 36, 0]
    assert shown(tiff(ramp, 16, t262=[BLACK_IS_ZERO]))[0, :, 0].tolist() == [0, 36, 73, 109, 146, 182, 219, 255]


@COMPRESSIONS
def test_twelve_bits_fill_the_range(compression):
    values = random(12)
    content = tiff(values, 12, "<", compression, t262=[BLACK_IS_ZERO])
    np.testing.assert_array_equal(shown(content), np.repeat(values >> 4, 3, axis=2))


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("bits", [8, 16])
def test_colours_of_eight_and_sixteen_bits(bits, compression, order):
    values = random(bits, 4)
    rgb, cmyk = values[..., :3], values >> (bits - 8)
    np.testing.assert_array_equal(shown(tiff(rgb, bits, order, compression, t262=[RGB])), rgb >> (bits - 8))
    with_alpha = tiff(values, bits, order, compression, t262=[RGB], t338=[2])
    np.testing.assert_array_equal(shown(with_alpha), rgb >> (bits - 8))
    expected = (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255
    assert np.abs(shown(tiff(values, bits, order, compression, t262=[CMYK])) - expected).max() <= 1


@COMPRESSIONS
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits, compression):
    values, palette = random(bits), np.random.RandomState(1).randint(0, 256, (2**bits, 3))
    table = (palette.T.reshape(-1) * 257).tolist()
    content = tiff(values, bits, "<", compression, t262=[PALETTE], t320=table)
    np.testing.assert_array_equal(shown(content), palette[values[..., 0]])


def test_luma_and_chroma():
    values = np.array([[[76, 85, 255], [150, 44, 21], [29, 255, 107], [255, 128, 128], [0, 128, 128]]])
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]
    out = shown(tiff(values, 8, "<", DEFLATE, t262=[YCBCR], t530=[1, 1]))
    assert np.abs(out[0].astype(int) - expected).max() <= 2


@COMPRESSIONS
def test_lab(compression):
    """Red, green, blue, white, black and gray, in CIELAB with the white point D50."""
    lab = np.zeros((6, 3))
    lab[:3] = [[54.29, 80.81, 69.89], [87.82, -79.27, 80.99], [29.57, 68.3, -112.03]]
    lab[3:, 0] = [100, 0, 53.6]
    values = np.round(np.column_stack([lab[:, 0] * 2.55, lab[:, 1:] % 256])).astype(np.int64)[None] % 256
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3, [0] * 3, [128] * 3]
    out = shown(tiff(values, 8, "<", compression, t262=[LAB]))
    assert np.abs(out[0].astype(int) - expected).max() <= 25  # PIL converts through a table of 8 bits


@COMPRESSIONS
@pytest.mark.parametrize("bits", [8, 16])
def test_channels_that_are_stored_separately(bits, compression):
    values = random(bits, 3)
    content = tiff(values, bits, "<", compression, planar=True, t262=[RGB])
    if (bits, compression) == (16, RAW):
        with pytest.raises(UnreadableError, match="its channels are stored separately"):
            decode(content, None)
        return
    np.testing.assert_array_equal(shown(content), values >> (bits - 8))
    with pytest.raises(UnreadableError, match=r"its channels are stored separately|raw mode"):
        decode(tiff(random(bits, 4), bits, "<", compression, planar=True, t262=[RGB]), None)


@COMPRESSIONS
@pytest.mark.parametrize(
    ("bits", "tags", "reason"),
    [
        (8, {"t262": [BLACK_IS_ZERO], "t339": [2]}, "its pixels are signed numbers"),
        (16, {"t262": [BLACK_IS_ZERO], "t339": [2]}, "its mode is I instead of 8 or 16 bits"),
        (32, {"t262": [BLACK_IS_ZERO]}, "its mode is I instead of 8 or 16 bits"),
        (32, {"t262": [BLACK_IS_ZERO], "t339": [3]}, "its mode is F instead of 8 or 16 bits"),
    ],
)
def test_other_numbers_are_refused(bits, tags, reason, compression):
    with pytest.raises(UnreadableError, match=reason):
        decode(tiff(random(bits), bits, "<", compression, **tags), None)


def test_subsampled_colours_without_compression_are_refused():
    content = tiff(random(8, 3), 8, t262=[YCBCR]) + bytes(1000)  # 2x2 is the default of the format
    with pytest.raises(UnreadableError, match=r"its colours are subsampled|truncated"):
        decode(content, None)


@COMPRESSIONS
def test_orientation_is_applied_once(compression):
    values = random(8, 3)[:5]
    content = tiff(values, 8, "<", compression, t262=[RGB], t274=[6])
    np.testing.assert_array_equal(shown(content), np.rot90(values, -1))
