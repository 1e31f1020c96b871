"""Deterministic parameters of a network from their names and shapes, the same for the reference
implementation and ours."""

import zlib

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def draw(name: str) -> np.random.Generator:
    """Returns a random generator seeded by a name, the same on every machine."""
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 values that preserve the scale of activations in a deep network."""
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
    """Returns all parameters of a network."""
    return {name: value(name, shape) for name, shape in shapes.items()}


def images(side: int) -> np.ndarray:
    """Returns two standardised images, NHWC."""
    # The name decides the numbers: the stored references were made with this one.
    return draw(f"pictures {side}").standard_normal((2, side, side, 3), np.float32)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns weights that reduce a gradient or logits to one number."""
    return draw(f"direction {name}").standard_normal(shape, np.float32)


SAMPLES = 1024


def sample(mid: np.ndarray) -> np.ndarray:
    """Returns evenly spaced values of a mid map, NHWC."""
    flat = mid.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(int)]
