"""Encoded images to RGB arrays and back, and the fixed resize of evaluation."""

import io
import math

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

from afa.data.types import RawImage

# Images are small and several read threads run at once: OpenCV's own pool would only add waits.
cv2.setNumThreads(1)

WHITE = 255
EXIF_ORIENTATION = 0x0112
EXIF_SEARCH_BYTES = 4096  # the Exif segment stands first in a JPEG, at most behind JFIF's
PNG_TAIL_BYTES = 12  # length, name and checksum of the closing IEND chunk
HARMLESS = "extraneous bytes"  # stray bytes between JPEG segments, common in the wild


class UnreadableImage(ValueError):
    """An image that cannot be decoded completely; the text is the reason."""


def decode(image: RawImage, min_side: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an image, upright (EXIF), greyscale and CMYK converted, alpha over white.

    Args:
      image: encoded (anything OpenCV or Pillow reads) or already decoded, then returned as is.
      min_side: a large JPEG may come back smaller by a factor of up to 8 as long as both sides
        keep this many pixels; 0 keeps the full size.

    Raises:
      UnreadableImage: not an image, damaged, or truncated.
    """
    if isinstance(image, np.ndarray):
        return image
    try:
        if image[:2] == b"\xff\xd8":
            return _decode_jpeg(image, min_side)
        if image[:4] == b"\x89PNG" and b"eXIf" not in image[:EXIF_SEARCH_BYTES]:
            return _decode_png(image)
        return _decode_any(image)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        reason = "not an image of a known format" if image else "empty file"
        raise UnreadableImage(reason) from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from None


def _decode_jpeg(data: bytes, min_side: int) -> UInt8[np.ndarray, "h w 3"]:
    if b"Exif\0" in data[:EXIF_SEARCH_BYTES]:
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
                return _decode_any(data)
    try:
        return _turbo(data, min_side, strict=True)
    except ValueError as error:
        if HARMLESS in str(error):
            return _turbo(data, min_side, strict=False)
        return _decode_any(data)  # CMYK and rare encodings; raises for damaged ones


def _turbo(data: bytes, min_side: int, strict: bool) -> UInt8[np.ndarray, "h w 3"]:
    return simplejpeg.decode_jpeg(
        data, "RGB", min_height=min_side, min_width=min_side, strict=strict
    )


def _decode_png(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    if b"IEND" not in data[-PNG_TAIL_BYTES:]:
        return _decode_any(data)  # OpenCV fills what is missing in silence, Pillow refuses
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint8:
        return _decode_any(data)
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return _decode_any(data)


def _decode_any(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip, not scale
            values = np.asarray(image, np.int64)
            image = Image.fromarray((values >> (8 if values.max() > WHITE else 0)).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            paper = Image.new("RGBA", image.size, (WHITE, WHITE, WHITE, WHITE))
            image = Image.alpha_composite(paper, image)
        return np.array(image.convert("RGB"))


def resize(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resamples: area averages when it shrinks, so that nothing aliases, bilinear when it grows."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    shrinks = image.shape[0] > height or image.shape[1] > width
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def resize_crop(
    image: UInt8[np.ndarray, "h w 3"], size: int, crop_fraction: float
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The centre square of an image: shorter side to `size / crop_fraction`, then centre crop.

    Cropping comes first here, which gives the same view (up to half a pixel) for less work.
    """
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * crop_fraction))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)


def evaluation_side(size: int, crop_fraction: float) -> int:
    """The pixels that both sides of a decoded image have to keep for `resize_crop`."""
    return math.ceil(size / crop_fraction)


def evaluation_view(
    image: RawImage, size: int, crop_fraction: float
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """What the networks see of an image at evaluation and search.

    Raises:
      UnreadableImage: it cannot be decoded.
    """
    pixels = decode(image, evaluation_side(size, crop_fraction))
    return resize_crop(pixels, size, crop_fraction)


def encode_jpeg(image: UInt8[np.ndarray, "h w 3"], quality: int = 92) -> bytes:
    """JPEG bytes of an RGB image, `quality` 1..100."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
