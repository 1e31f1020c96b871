"""Decoding of every image format, errors of damaged images, and the resize of evaluation."""

import contextlib
import io
import struct
import subprocess
import sys
import types

import image_files
import numpy as np
import pytest
from image_files import chunk, png, tiff
from paths import ROOT
from PIL import Image, features

from afa.data import images
from afa.data.images import UnreadableImage, decode, encode_jpeg, resize, resize_crop
from afa.data.types import Files, ImageSet, Subset


@pytest.fixture
def pixels():
    """A smooth 30 x 44 image whose channels all differ."""
    y, x = np.mgrid[0:30, 0:44]
    return np.stack([x * 5, y * 8, 255 - x * 5], axis=-1).astype(np.uint8)


def encoded(pixels, kind, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_round_trip_exactly(pixels, kind):
    np.testing.assert_array_equal(decode(encoded(pixels, kind)), pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_round_trips_approximately(pixels, options):
    error = decode(encoded(pixels, "JPEG", quality=95, **options)).astype(int) - pixels
    assert np.abs(error).mean() < 3


def test_cmyk_becomes_rgb(pixels):
    error = decode(encoded(pixels, "JPEG", "CMYK", quality=95)).astype(int) - pixels
    assert np.abs(error).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_greyscale_becomes_three_equal_channels(pixels, kind):
    out = decode(encoded(pixels, kind, "L"))
    assert out.shape == (30, 44, 3)
    assert (out == out[..., :1]).all()


def test_sixteen_bits_are_scaled_to_eight():
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    np.testing.assert_array_equal(decode(buffer.getvalue())[..., 0], values >> 8)


def test_transparency_is_composed_over_white(pixels):
    alpha = np.zeros((30, 44, 1), np.uint8)
    alpha[:, :22] = 255
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, alpha], axis=-1)).save(buffer, "PNG")
    out = decode(buffer.getvalue())
    np.testing.assert_array_equal(out[:, :22], pixels[:, :22])
    assert (out[:, 22:] == 255).all()


def test_exif_orientation_is_applied(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    upright = decode(encoded(pixels, "JPEG", quality=95, exif=exif))
    assert upright.shape == (44, 30, 3)
    error = upright.astype(int) - np.rot90(pixels, -1)
    assert np.abs(error).mean() < 3


UPRIGHT = {  # of an image that was stored with each EXIF orientation
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_in_every_format(pixels, kind, orientation):
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = image_files.saved(pixels, kind, exif=image_files.exif(orientation), **options)
    expected = UPRIGHT[orientation](pixels)
    found = decode(data)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 5


@pytest.mark.parametrize("segment", ["XMP", "ICC", "comment", "all"])
def test_orientation_after_long_segments(pixels, segment):
    """Programs write kilobytes of XMP, colour profile or comment before the Exif segment."""
    padding = {
        "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b" " * 6000),
        "ICC": (0xE2, b"ICC_PROFILE\0\1\1" + b"\0" * 6000),
        "comment": (0xFE, b"x" * 60000),
    }
    chosen = padding.values() if segment == "all" else [padding[segment]]
    data = image_files.saved(pixels, "JPEG", quality=95, exif=image_files.exif(6))
    found = decode(image_files.with_segments(data, *chosen))
    assert np.abs(found.astype(int) - np.rot90(pixels, -1)).mean() < 3


def test_png_orientation_after_the_pixels_or_in_xmp(pixels):
    rows = [row.tobytes() for row in pixels]
    tags = image_files.exif(8).tobytes().removeprefix(b"Exif\0\0")
    behind = png(44, 30, 8, 2, rows, after=chunk(b"eXIf", tags))
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='8'/>".replace(b"'", b'"')
    for data in (behind, png(44, 30, 8, 2, rows, before=chunk(b"iTXt", xmp))):
        np.testing.assert_array_equal(decode(data), np.rot90(pixels))


def test_rotated_jpeg_can_be_decoded_smaller():
    data = image_files.saved(np.zeros((400, 600, 3), np.uint8), "JPEG", exif=image_files.exif(6))
    height, width, _ = decode(data, min_side=100).shape
    assert 100 <= width < 400 and height == width * 3 // 2


DAMAGED_EXIF = (0xE1, b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" * 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_is_ignored(pixels):
    data = image_files.saved(pixels, "JPEG", quality=95)
    np.testing.assert_array_equal(
        decode(image_files.with_segments(data, DAMAGED_EXIF)), decode(data)
    )


def test_pillow_metadata_warnings_are_silenced(pixels, tmp_path):
    path = tmp_path / "damaged.jpg"
    jpeg = image_files.saved(pixels, "JPEG")
    path.write_bytes(image_files.with_segments(jpeg, DAMAGED_EXIF))
    code = (
        "import pathlib, sys; from afa.data.images import decode;"
        "decode(pathlib.Path(sys.argv[1]).read_bytes())"
    )
    words = [sys.executable, "-W", "default::UserWarning", "-c", code, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""


def clear(*values):
    """The chunk that makes one colour of a PNG transparent."""
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (png(2, 1, 1, 0, [b"\x80"], clear(1)), [255, 0]),
        (png(2, 1, 2, 0, [b"\x60"], clear(1)), [255, 170]),
        (png(2, 1, 4, 0, [b"\x59"], clear(5)), [255, 153]),
        (png(2, 1, 8, 0, [bytes([140, 100])], clear(140)), [255, 100]),
        (image_files.grey16([20000, 30000], clear(20000)), [255, 117]),
        (png(2, 1, 8, 2, [bytes([9, 9, 9, 7, 7, 7])], clear(9, 9, 9)), [255, 7]),
        (png(2, 1, 16, 2, [bytes([3] * 6 + [19] * 6)], clear(771, 771, 771)), [255, 19]),
        (png(2, 1, 8, 3, [b"\0\1"], chunk(b"PLTE", b"999777") + chunk(b"tRNS", b"\0")), [255, 55]),
        (png(2, 1, 8, 4, [bytes([100, 128, 7, 255])]), [177, 7]),
        (png(2, 1, 16, 4, [np.array([20000, 0, 30000, 65535], ">u2").tobytes()]), [255, 117]),
        (png(2, 1, 8, 6, [bytes([9, 9, 9, 0, 7, 7, 7, 255])]), [255, 7]),
    ],
    ids=["grey1", "grey2", "grey4", "grey8", "grey16", "rgb8", "rgb16", "palette", "la8", "la16",
         "rgba8"],
)  # fmt: skip
def test_transparency_is_composed_over_white_in_every_mode(data, shown):
    np.testing.assert_array_equal(decode(data), np.repeat([shown], 3, axis=0).T[None])


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "GIF"])
def test_transparency_in_other_formats(pixels, kind):
    alpha = np.zeros((30, 44, 1), np.uint8)
    alpha[:, :22] = 255
    options = {"lossless": True} if kind == "WEBP" else {}
    data = image_files.saved(np.concatenate([pixels, alpha], axis=-1), kind, **options)
    assert (decode(data)[:, 24:] == 255).all()
    assert (decode(data)[:, :20] < 255).any()


RAMP = np.linspace(0, 1, 9, dtype=np.float32)


def test_white_of_sixteen_bits_does_not_depend_on_the_brightest_pixel():
    values = np.array([0, 100, 255, 4095])
    for count in (3, 4):  # with and without a value above 255
        found = decode(image_files.grey16(values[:count]))[0, :, 0]
        np.testing.assert_array_equal(found, values[:count] >> 8)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("moved", [False, True], ids=["as they are", "moved to the top"])
def test_declared_bit_depth_of_a_png_is_used(bits, moved):
    values = np.round(RAMP * (2**bits - 1)).astype(int)
    data = image_files.grey16(
        values << 16 - bits if moved else values, chunk(b"sBIT", bytes([bits]))
    )
    np.testing.assert_array_equal(decode(data)[0, :, 0], values >> bits - 8)


def test_dark_png_with_declared_bit_depth_stays_dark():
    data = image_files.grey16(np.array([0, 16, 160]), chunk(b"sBIT", b"\x0c"))
    assert decode(data).max() == 0


def test_floating_point_white_is_one():
    np.testing.assert_array_equal(
        decode(image_files.saved(RAMP[None], "TIFF"))[0, :, 0], np.round(RAMP * 255)
    )


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (tiff(3, 16, np.array([0, 30000, 65535], "<u2").tobytes()), [0, 117, 255]),
        (tiff(3, 16, np.array([0, 30000, 65535], "<u2").tobytes(), 0), [255, 138, 0]),
        (tiff(3, 8, bytes([0, 100, 255]), 0), [255, 155, 0]),
        (tiff(2, 12, bytes([0xFF, 0xF8, 0x00])), [255, 128]),
        (b"P5 2 1 4095\n" + np.array([2000, 4095], ">u2").tobytes(), [125, 255]),
        (b"P5 2 1 65535\n" + np.array([200, 65535], ">u2").tobytes(), [0, 255]),
    ],
    ids=["16", "16, white is 0", "8, white is 0", "12", "pgm of 12", "pgm of 16"],
)
def test_greyscale_of_any_depth(data, shown):
    np.testing.assert_array_equal(decode(data)[0, :, 0], shown)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (image_files.saved(RAMP[None] * 255, "TIFF"), "floating-point values outside 0..1"),
        (
            image_files.saved(RAMP[None] * np.float32(np.nan), "TIFF"),
            "floating-point values outside",
        ),
        (
            image_files.saved((RAMP[None] * 1e5).astype(np.int32), "TIFF"),
            "signed or 32-bit integers",
        ),
        (
            tiff(2, 16, np.array([-9, 9], "<i2").tobytes(), 1, 2),
            "signed or 32-bit integers",
        ),
    ],
    ids=["float to 255", "nan", "int32", "int16"],
)
def test_pixels_without_a_defined_white_level_are_an_error(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)


def test_too_many_pixels_are_an_error_before_decoding():
    """A PNG of 400 million pixels has 388 kB; the headers of all formats have the size."""
    small = np.zeros((8, 8, 3), np.uint8)
    jpeg = image_files.saved(small, "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    bmp, size = image_files.saved(small, "BMP"), struct.pack("<ii", 20000, 20000)
    for data in (
        png(20000, 20000, 8, 2, [b"\0" * 9]),
        jpeg[:frame] + struct.pack(">HH", 20000, 20000) + jpeg[frame + 4 :],
        bmp[:18] + size + bmp[26:],
    ):
        with pytest.raises(UnreadableImage, match="pixels") as refused:
            decode(data)
        assert f"{images.MAX_PIXELS:,}" in str(refused.value)


def test_heif_is_read_if_pillow_heif_is_installed(pixels, monkeypatch):
    data = b"\0\0\0\x18ftypheic" + bytes(20)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(images, "heif_installed", lambda: False)
    with pytest.raises(UnreadableImage, match="HEIF, and pillow-heif is not installed"):
        decode(data)
    opened = Image.open

    def register():
        stored = image_files.saved(pixels, "PNG")
        monkeypatch.setattr(Image, "open", lambda _: opened(io.BytesIO(stored)))

    decoder = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", decoder)
    monkeypatch.setattr(images, "heif_installed", lambda: True)
    np.testing.assert_array_equal(decode(data), pixels)


def test_large_jpeg_is_decoded_smaller_but_above_min_side():
    data = encode_jpeg(np.zeros((400, 600, 3), np.uint8))
    height, width, _ = decode(data, min_side=100).shape
    assert 100 <= height < 400
    assert 100 <= width < 600
    assert decode(data).shape == (400, 600, 3)


def test_decoded_images_are_returned_unchanged(pixels):
    assert decode(pixels) is pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_truncated_images_are_an_error(pixels, kind):
    data = encoded(pixels, kind)
    with pytest.raises(UnreadableImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_damaged_files_raise_or_decode_without_output(kind, capfd):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    intact = image_files.saved(noise, kind)
    for seed in range(12):
        draw, data = np.random.default_rng(seed), bytearray(intact)
        for offset in draw.integers(8, len(data), 8):
            data[offset] ^= int(draw.integers(1, 256))
        with contextlib.suppress(UnreadableImage, UserWarning):
            decode(bytes(data))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty file"), (b"hello", "not an image of a known format")],
)
def test_other_files_are_an_error_with_a_reason(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)


def test_resize_crop_takes_the_centre():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    assert (resize_crop(image, 10, 1.0) == 200).all()
    image[10:30, 30:50] = 90
    assert (resize_crop(image, 20, 0.5) == 90).all()


def test_shrinking_averages():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    out = resize(np.repeat(board[..., None], 3, axis=-1), 16, 16)
    assert np.abs(out.astype(int) - 127.5).max() <= 1


def test_subsets_read_the_correct_images(tmp_path):
    paths = []
    for i in range(5):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(bytes([i]))
        paths.append(str(path))
    labels, none = np.arange(5, dtype=np.int64), np.zeros(5, bool)
    ids = tuple("abcde")
    files = ImageSet(Files(paths), labels, ids, none).subset(np.array([4, 1, 3]))
    again = files.subset(np.array([2, 0]))
    assert (list(again.images), again.ids, again.labels.tolist()) == (
        [bytes([3]), bytes([4])],
        ("d", "e"),
        [3, 4],
    )
    assert again.path(0) == paths[3]
    memory = ImageSet([bytes([i]) for i in range(5)], labels, ids, none)
    chosen = memory.subset(np.array([4, 1, 3])).subset(np.array([2, 0]))
    assert isinstance(chosen.images, Subset)
    assert list(chosen.images) == [bytes([3]), bytes([4])]
    assert chosen.path(0) == "d"


def test_image_set_with_columns_of_unequal_length_is_an_error():
    with pytest.raises(ValueError, match="differ in length"):
        ImageSet([b"x"], np.zeros(2, np.int64), ("a", "b"), np.zeros(2, bool))
