"""Image files that Pillow cannot write: any bit depth, or extra segments."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def saved(pixels, kind, mode=None, **options):
    """Encodes an array with Pillow."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, kind, rows, before=b"", after=b""):
    """Returns a PNG of packed rows.

    Args:
      kind: colour type: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha.
      before, after: chunks around the pixels.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", packed), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grey16(values, before=b""):
    """Returns a PNG of one row of 16-bit grey values."""
    return png(len(values), 1, 16, 0, [np.array(values, ">u2").tobytes()], before)


def tiff(width, bits, data, photometric=1, sample_format=1):
    """Returns a TIFF of one row of grey values, packed in `data`."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1,
            279: len(data), 339: sample_format}  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # offset of the pixels
    entries = [struct.pack("<HHIHH", tag, 3, 1, tags[tag], 0) for tag in sorted(tags)]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(entries) + struct.pack("<I", 0) + data


def with_segments(jpeg, *segments):
    """Inserts segments (marker, content) at the beginning of a JPEG."""
    inside = b"".join(
        b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content
        for marker, content in segments
    )
    return jpeg[:2] + inside + jpeg[2:]


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags
