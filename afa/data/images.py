"""Image decoding and encoding, and the resize and centre crop of evaluation."""

import importlib
import importlib.util
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8, UInt16
from PIL import Image

from afa.data.types import RawImage

# Several reader threads decode small images at once; OpenCV's own threads would slow them down.
cv2.setNumThreads(1)

MAX_PIXELS = 2**27  # 134 million, 403 MB of RGB: above camera resolutions; bounds the memory
WHITE = 255
BYTE = 8  # bits per channel of the result
EXIF_ORIENTATION = 0x0112
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
MIN_IS_WHITE, UNSIGNED = 0, 1
# A JPEG or PNG without any of these byte strings has no orientation: EXIF in its own segment or
# chunk, EXIF in the text chunk that older programs write, and XMP.
ORIENTATION_MARKS = (b"Exif\0", b"eXIf", b"Raw profile type", b"tiff:Orientation", b"adobe.xmp")
HARMLESS = "extraneous bytes"  # extra bytes between JPEG segments, common in practice
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY = 0  # PNG colour type

# Pillow's warnings on unusual metadata do not help a user who gave a folder of images.
warnings.filterwarnings("ignore", module=r"PIL\.")

Pixels = UInt8[np.ndarray, "_ _ 3"]
TO_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientation -> upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


class UnreadableImage(ValueError):
    """An image cannot be decoded completely; the message is the reason."""


def decode(image: RawImage, min_side: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image to upright 8-bit RGB.

    - Orientation: applied from EXIF or XMP, in every format that has it.
    - Transparency: composed over white, in every mode.
    - Greyscale and CMYK: converted to RGB.
    - 16 bits: 65535 is white. If a PNG (sBIT) or TIFF (BitsPerSample) declares fewer bits, their
      largest value is white.
    - Floating point: 0 is black, 1 is white; other values are an error.
    - Signed or 32-bit integers: an error, because their white level is not defined.

    Args:
      image: encoded (any format that OpenCV or Pillow reads), or already decoded, which is
        returned unchanged.
      min_side: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if both sides keep at
        least this many pixels; 0 decodes at full size.

    Raises:
      UnreadableImage: not an image, damaged, truncated, unsupported, or larger than `MAX_PIXELS`,
        which is checked before decoding.
    """
    if isinstance(image, np.ndarray):
        return image
    try:
        if image[:2] == b"\xff\xd8":
            return _decode_jpeg(image, min_side)
        if image[:8] == PNG_SIGNATURE:
            return _decode_png(image)
        return _decode_any(image)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        reason = "not an image of a known format" if image else "empty file"
        raise UnreadableImage(reason) from None
    except Image.DecompressionBombError:  # Pillow's own limit, above MAX_PIXELS
        raise UnreadableImage(f"more than {MAX_PIXELS:,} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error) as error:
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from None


def heif_installed() -> bool:
    """Returns whether HEIF images (.heic) can be decoded (pillow-heif is installed)."""
    return importlib.util.find_spec("pillow_heif") is not None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{width} x {height} is {width * height:,} pixels, and {MAX_PIXELS:,} is the limit"
        )


def _read_orientation(data: bytes) -> int:
    """Returns the EXIF orientation of a JPEG or PNG; 1 (upright) by default."""
    if not any(mark in data for mark in ORIENTATION_MARKS):
        return 1
    with Image.open(io.BytesIO(data)) as image:
        return _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata of any kind: the pixels can still be decoded
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    transform = TO_UPRIGHT.get(orientation)
    return pixels if transform is None else np.ascontiguousarray(transform(pixels))


# ---- JPEG ---------------------------------------------------------------------------------------


def _decode_jpeg(data: bytes, min_side: int) -> Pixels:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: no frame header
        return _decode_any(data)
    _check_size(int(width), int(height))
    try:
        pixels = _turbo(data, min_side, strict=True)
    except ValueError as error:
        if HARMLESS not in str(error):
            return _decode_any(data)  # CMYK and rare encodings; raises for damaged files
        pixels = _turbo(data, min_side, strict=False)
    return _upright(pixels, _read_orientation(data))


def _turbo(data: bytes, min_side: int, strict: bool) -> Pixels:
    return simplejpeg.decode_jpeg(
        data, "RGB", min_height=min_side, min_width=min_side, strict=strict
    )


# ---- PNG ----------------------------------------------------------------------------------------


def _decode_png(data: bytes) -> Pixels:
    chunks = _chunks(data)
    if len(chunks.get(b"IHDR", b"")) != 13:
        return _decode_any(data)
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    _check_size(width, height)
    if b"IEND" not in chunks:
        return _decode_any(data)  # OpenCV fills missing rows without an error; Pillow raises
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
        return _decode_any(data)
    alpha = None
    if pixels.ndim == 2:
        if b"tRNS" in chunks and kind == GREY:  # OpenCV ignores tRNS of greyscale images
            clear = int.from_bytes(chunks[b"tRNS"][:2], "big")
            clear *= WHITE // (2**depth - 1) if depth < BYTE else 1
            alpha = np.where(pixels == clear, 0, WHITE).astype(np.uint8)
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    elif pixels.shape[2] == 4:
        alpha = pixels[:, :, 3]
        alpha = alpha if alpha.dtype == np.uint8 else _byte(alpha, 2 * BYTE)
    colours = np.ascontiguousarray(pixels[:, :, 2::-1])
    if colours.dtype == np.uint16:
        colours = _byte(colours, _value_bits(colours, chunks.get(b"sBIT", b"")[:3]))
    if alpha is not None:
        colours = _over_white(colours, alpha)
    return _upright(colours, _read_orientation(data))


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """Returns the first chunk of each type except IDAT, up to the first damaged chunk."""
    found: dict[bytes, bytes] = {}
    offset = len(PNG_SIGNATURE)
    while offset + 12 <= len(data):  # length, type and checksum
        size, name = int.from_bytes(data[offset : offset + 4], "big"), data[offset + 4 : offset + 8]
        end = offset + 8 + size
        if zlib.crc32(data[offset + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            break  # Pillow raises with a reason; OpenCV would print to the terminal
        if name != b"IDAT":
            found.setdefault(name, data[offset + 8 : end])
        if name == b"IEND":
            break
        offset = end + 4
    return found


def _value_bits(values: UInt16[np.ndarray, "..."], significant: bytes) -> int:
    """Returns the number of bits that the values of a 16-bit PNG use; the largest value is white.

    sBIT gives the bits of the source. The standard (PNG 3, section 12.4) scales them to 16 bits
    with zeros or repeated top bits in the low bits: then the result is 16. Many programs write sBIT
    without scaling the values: then the result is sBIT.
    """
    bits = max(significant, default=2 * BYTE)
    if not BYTE <= bits < 2 * BYTE:
        return 2 * BYTE
    low_bits = values & (2 ** (2 * BYTE - bits) - 1)
    if not low_bits.any() or np.array_equal(low_bits, values >> bits) or values.max() >> bits:
        return 2 * BYTE
    return bits


# ---- other formats ------------------------------------------------------------------------------


def _decode_any(data: bytes) -> Pixels:
    with _opened(data) as image:
        _check_size(*image.size)
        image.load()
        orientation = _orientation(image)
        if image.mode == "F" or image.mode.startswith("I"):
            grey = _to_grey(image)
            return _upright(np.repeat(grey[:, :, None], 3, axis=2), orientation)
        if not image.has_transparency_data:
            return _upright(np.array(image.convert("RGB")), orientation)
        rgba = np.asarray(image.convert("RGBA"))
        return _upright(_over_white(rgba[:, :, :3], rgba[:, :, 3]), orientation)


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        brand = data[8:12] if data[4:8] == b"ftyp" else b""
        if brand in AVIF_BRANDS:
            raise UnreadableImage("AVIF, which this Pillow cannot decode") from None
        if data[:2] == b"\xff\x0a" or data[4:8] == b"JXL ":
            raise UnreadableImage("JPEG XL, which is not decoded") from None
        if brand not in HEIF_BRANDS:
            raise
        if not heif_installed():
            raise UnreadableImage("HEIF, and pillow-heif is not installed") from None
    heif: Any = importlib.import_module("pillow_heif")
    heif.register_heif_opener()
    return Image.open(io.BytesIO(data))


def _to_grey(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """Converts a single channel of more than 8 bits to 8 bits, by the rules of `decode`.

    Raises:
      UnreadableImage: the white level is not defined.
    """
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        if not np.all((values >= 0) & (values <= 1)):
            raise UnreadableImage("floating-point values outside 0..1")
        grey = np.round(values * WHITE).astype(np.uint8)
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two are 16 bits
        raise UnreadableImage("signed or 32-bit integers: convert it to 8 or 16 bits")
    elif tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] != UNSIGNED:
        raise UnreadableImage("signed integers: convert it to 8 or 16 bits")
    else:
        bits = tags.get(BITS_PER_SAMPLE, (2 * BYTE,))[0]
        grey = _byte(values.astype(np.uint16), max(bits, BYTE))
    return WHITE - grey if tags.get(PHOTOMETRIC) == MIN_IS_WHITE else grey


def _byte(values: UInt16[np.ndarray, "..."], bits: int) -> UInt8[np.ndarray, "..."]:
    return (values >> (bits - BYTE)).astype(np.uint8)


def _over_white(colours: Pixels, alpha: UInt8[np.ndarray, "_ _"]) -> Pixels:
    opacity = alpha[:, :, None].astype(np.uint16)
    mixed = colours.astype(np.uint16) * opacity + WHITE * (WHITE - opacity)
    return ((mixed + WHITE // 2) // WHITE).astype(np.uint8)


def resize(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resizes with area averaging when shrinking (no aliasing), and bilinearly when enlarging."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    shrinks = image.shape[0] > height or image.shape[1] > width
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def resize_crop(
    image: UInt8[np.ndarray, "h w 3"], size: int, crop_fraction: float
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resizes the shorter side to `size / crop_fraction`, then takes the centre crop.

    Implemented as crop, then resize: the same result up to half a pixel, and faster.
    """
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * crop_fraction))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)


def evaluation_side(size: int, crop_fraction: float) -> int:
    """Returns the shortest side, in pixels, that a decoded image needs for `resize_crop`."""
    return math.ceil(size / crop_fraction)


def evaluation_view(
    image: RawImage, size: int, crop_fraction: float
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decodes, resizes and crops an image as in evaluation and search.

    Raises:
      UnreadableImage: the image cannot be decoded.
    """
    pixels = decode(image, evaluation_side(size, crop_fraction))
    return resize_crop(pixels, size, crop_fraction)


def encode_jpeg(image: UInt8[np.ndarray, "h w 3"], quality: int = 92) -> bytes:
    """Encodes an RGB image as JPEG, at `quality` 1 to 100."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
