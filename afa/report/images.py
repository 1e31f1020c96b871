"""Draws grids, frames and the image of search results, and encodes images as data URIs.

An image is a uint8 array (h, w, 3), RGB.
"""

import base64
import io
from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Pixels: TypeAlias = UInt8[np.ndarray, "_ _ 3"]
Colour: TypeAlias = tuple[int, int, int]

PAPER: Colour = (250, 250, 248)
INK: Colour = (28, 31, 35)
FAINT: Colour = (96, 101, 108)
RULE: Colour = (206, 208, 210)
RIGHT: Colour = (26, 138, 79)
WRONG: Colour = (207, 59, 52)

CELL = 168  # pixels of the longer side of a result
QUERY_CELL = 232
FRAME = 4
MARGIN = 24
SHEET_COLUMNS = 5
TEXT_SIZE = 15
LINE = 22  # line height of text in pixels
BADGE = 26  # side in pixels of the square with the strokes below
TICK = (((6, 14), (11, 19), (20, 8)),)
CROSS = (((8, 8), (18, 18)), ((8, 18), (18, 8)))
JPEG_QUALITY = 82


def grid(images: Sequence[Pixels], columns: int, gap: int = 8) -> Pixels:
    """Arranges images of one size in a grid, row by row, `gap` pixels apart.

    Raises:
      ValueError: no images, fewer than one column, or images of different sizes.
    """
    if not images or columns < 1:
        raise ValueError("a grid needs at least one image and one column")
    height, width, _ = images[0].shape
    if any(image.shape != images[0].shape for image in images):
        raise ValueError("the images of a grid must have one size")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(size, PAPER, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def framed(image: Pixels, colour: Colour, width: int = FRAME) -> Pixels:
    """Adds a frame of `width` pixels around the image."""
    height, breadth, _ = image.shape
    out = np.full((height + 2 * width, breadth + 2 * width, 3), colour, np.uint8)
    out[width : width + height, width : width + breadth] = image
    return out


def shrunk(image: Pixels, longest: int) -> Pixels:
    """Shrinks the image so that its longer side has at most `longest` pixels; never enlarges."""
    height, width, _ = image.shape
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def to_png_data_uri(image: Pixels) -> str:
    """Encodes the image as a PNG data URI."""
    return _data_uri(image, "png", optimize=True)


def to_jpeg_data_uri(image: Pixels, quality: int = JPEG_QUALITY) -> str:
    """Encodes the image as a JPEG data URI."""
    return _data_uri(image, "jpeg", quality=quality, optimize=True)


def _data_uri(image: Pixels, kind: str, **options: int | bool) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def results_sheet(
    query: Pixels, results: Sequence[tuple[Pixels, str, float, bool | None]]
) -> Pixels:
    """Draws a query and its results: the query on the left, the results on the right.

    Args:
      query: the query image.
      results: (image, name, score, correct), best first. Names may have several lines, all the
        same number. `correct` None means unknown and gives a grey frame without a mark; otherwise
        the frame is green with a tick or red with a cross.

    Returns:
      An image whose size depends on the number of results only.
    """
    cells = [_result_cell(rank, *result) for rank, result in enumerate(results, start=1)]
    found = grid(cells, SHEET_COLUMNS, gap=MARGIN) if cells else _fitted(query, 1)[:0]
    left = _captioned(framed(_fitted(query, QUERY_CELL), INK), ["Query"])
    height = max(left.shape[0], found.shape[0]) + 2 * MARGIN
    rule = 2 * MARGIN + left.shape[1]
    right = rule + MARGIN
    width = right + found.shape[1] + MARGIN if cells else rule
    sheet = np.full((height, width, 3), PAPER, np.uint8)
    sheet[MARGIN : MARGIN + left.shape[0], MARGIN : MARGIN + left.shape[1]] = left
    if cells:
        sheet[MARGIN : height - MARGIN, rule] = RULE
        sheet[MARGIN : MARGIN + found.shape[0], right : right + found.shape[1]] = found
    return sheet


def _result_cell(rank: int, image: Pixels, name: str, score: float, correct: bool | None) -> Pixels:
    colour = RULE if correct is None else RIGHT if correct else WRONG
    cell = framed(_fitted(image, CELL), colour)
    if correct is not None:
        cell = _marked(cell, colour, correct)
    return _captioned(cell, [f"{rank}    {score:.3f}", *name.split("\n")])


def _fitted(image: Pixels, side: int) -> Pixels:
    """Resizes the image to fit a square of `side` pixels and centres it, without cropping."""
    height, width, _ = image.shape
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = np.asarray(cv2.resize(image, size, interpolation=method), np.uint8)
    square = np.full((side, side, 3), PAPER, np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = resized
    return square


def _marked(image: Pixels, colour: Colour, correct: bool) -> Pixels:
    """Draws a tick or a cross in the corner, for readers who cannot tell the frame colours."""
    left = image.shape[1] - BADGE
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, 0, left + BADGE, BADGE), fill=colour)
    for stroke in TICK if correct else CROSS:
        points = [(left + x, y) for x, y in stroke]
        draw.line(points, fill="white", width=3, joint="curve")
    return np.asarray(canvas)


def _captioned(image: Pixels, lines: Sequence[str]) -> Pixels:
    """Adds lines of text below the image; the first is dark, the others are lighter."""
    height, width, _ = image.shape
    canvas = Image.new("RGB", (width, height + LINE * len(lines) + 6), PAPER)
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(TEXT_SIZE)
    for i, line in enumerate(lines):
        text = _clipped(line, width, draw, font)
        draw.text((0, height + 6 + i * LINE), text, fill=FAINT if i else INK, font=font)
    return np.asarray(canvas)


def _clipped(
    text: str,
    width: int,
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> str:
    """Cuts the start of a text that is too wide, because the end of a path is more specific."""
    if draw.textlength(text, font=font) <= width:
        return text
    cut = 1
    while cut < len(text) and draw.textlength("..." + text[cut:], font=font) > width:
        cut += 1
    return "..." + text[cut:]
