"""Decoding every kind of image, refusing damaged ones, and the resize of evaluation."""

import io

import numpy as np
import pytest
from PIL import Image

from afa.data.images import UnreadableImage, decode, encode_jpeg, resize, resize_crop
from afa.data.types import Chosen, Files, ImageSet


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
def test_lossless_kinds_come_back_exactly(pixels, kind):
    np.testing.assert_array_equal(decode(encoded(pixels, kind)), pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_comes_back_nearly(pixels, options):
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


def test_sixteen_bits_are_scaled():
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    np.testing.assert_array_equal(decode(buffer.getvalue())[..., 0], values >> 8)


def test_transparency_shows_white_paper(pixels):
    alpha = np.zeros((30, 44, 1), np.uint8)
    alpha[:, :22] = 255
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, alpha], axis=-1)).save(buffer, "PNG")
    out = decode(buffer.getvalue())
    np.testing.assert_array_equal(out[:, :22], pixels[:, :22])
    assert (out[:, 22:] == 255).all()


def test_exif_orientation_is_honoured(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright, stored on its side
    upright = decode(encoded(pixels, "JPEG", quality=95, exif=exif))
    assert upright.shape == (44, 30, 3)
    error = upright.astype(int) - np.rot90(pixels, -1)
    assert np.abs(error).mean() < 3


def test_large_jpeg_may_be_decoded_smaller_but_not_too_small():
    data = encode_jpeg(np.zeros((400, 600, 3), np.uint8))
    height, width, _ = decode(data, min_side=100).shape
    assert 100 <= height < 400
    assert 100 <= width < 600
    assert decode(data).shape == (400, 600, 3)


def test_decoded_images_pass_through(pixels):
    assert decode(pixels) is pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_truncated_images_are_refused(pixels, kind):
    data = encoded(pixels, kind)
    with pytest.raises(UnreadableImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty file"), (b"hello", "not an image of a known format")],
)
def test_what_is_no_image_is_refused_with_the_reason(data, reason):
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


def test_subsets_read_the_right_images(tmp_path):
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
    assert isinstance(chosen.images, Chosen)
    assert list(chosen.images) == [bytes([3]), bytes([4])]
    assert chosen.path(0) == "d"


def test_an_image_set_of_unequal_parts_is_refused():
    with pytest.raises(ValueError, match="differ in length"):
        ImageSet([b"x"], np.zeros(2, np.int64), ("a", "b"), np.zeros(2, bool))
