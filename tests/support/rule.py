"""The rule that fills a network's parameters, from their names and shapes alone: on the side of the
reference and on ours."""

import zlib

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def draw(name: str) -> np.random.Generator:
    """Random numbers of a name: the same on every machine."""
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values that keep the size of activations through a deep network."""
    numbers, last = draw(name), name.rpartition(".")[2]
    if last == "running_var":
        return numbers.uniform(0.5, 1.5, shape).astype(np.float32)
    if last in ("gamma", "lambda1") or (last == "weight" and len(shape) == 1):
        return numbers.uniform(0.4, 0.8, shape).astype(np.float32)
    noise = numbers.standard_normal(shape, np.float32)
    if len(shape) in (2, 4):
        return noise * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return noise * np.float32(0.1)


def filled(shapes: Shapes) -> dict[str, np.ndarray]:
    """Every parameter of a network."""
    return {name: value(name, shape) for name, shape in shapes.items()}


def images(side: int) -> np.ndarray:
    """Two standardised images, NHWC."""
    return draw(f"images {side}").standard_normal((2, side, side, 3), np.float32)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a gradient, or the logits, are multiplied with to make one number of them."""
    return draw(f"direction {name}").standard_normal(shape, np.float32)


SAMPLES = 1024


def sample(mid: np.ndarray) -> np.ndarray:
    """Values of a mid map, NHWC, spread evenly over it."""
    flat = mid.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(int)]
