"""Fixtures of the tests of pretrained weights."""

import pytest
import weight_arrays

from afa.models.pretrained import zoo


@pytest.fixture(scope="module")
def shapes():
    """Shapes of the variables of the backbone `weight_arrays.NAME`."""
    return zoo.skeleton(weight_arrays.NAME)[1]


@pytest.fixture(scope="module")
def arrays(shapes):
    """What a file of its weights contains."""
    return weight_arrays.arrays(shapes)
