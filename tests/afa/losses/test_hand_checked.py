"""Metric losses at points simple enough for arithmetic by hand; see the comments."""

import jax
import jax.numpy as jnp
import numpy as np
from arrays import near

from afa.losses import arcface, proxy_synthesis
from afa.losses.base import State, euclidean, pairs
from afa.losses.circle import Circle
from afa.losses.cosface import CosFace
from afa.losses.cross_batch_memory import CrossBatchMemory
from afa.losses.lifted_structure import LiftedStructure
from afa.losses.memvir import MemVir
from afa.losses.nt_xent import NTXent
from afa.losses.proxy_nca import ProxyNCA
from afa.losses.proxy_synthesis import ProxySynthesis
from afa.losses.smooth_ap import SmoothAP
from afa.losses.soft_triple import SoftTriple
from afa.losses.triplet import Triplet

AXES = jnp.eye(2)
# Cosines: ab 0.6, an 0, bn 0.8.
ABN, ABN_LABELS = jnp.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), [0, 0, 1]


def value(loss, x, y, proxies=AXES, state=None):
    given = jnp.asarray(x), jnp.asarray(y, jnp.int32), proxies, jax.random.key(0)
    found, _ = jax.jit(loss.apply)(state or State(), *given)
    return float(found)


def test_cosface():
    # Logits 2 (1 - 0.25) = 1.5 and 0: log(1 + e^-1.5).
    near(value(CosFace(scale=2.0, margin=0.25), [[1.0, 0.0]], [0]), 0.201413)


def test_proxy_nca():
    # Squared distances 0 and 2; logits 0 and -2/0.5: log(1 + e^-4).
    near(value(ProxyNCA(temperature=0.5), [[1.0, 0.0]], [0]), 0.018150)


def test_arcface_with_centres():
    # Cosines: class 0 max(0, 1) = 1 with the centre (3, 0), class 1 max(0, -1) = 0. With m = 0.5
    # the logits are cos 0.5 = 0.877583 and 0: log(1 + e^-0.877583) = 0.347684.
    loss = arcface.ArcFace(scale=1.0, margin=0.5, centres=2)
    centres = jnp.asarray([[[0.0, 1.0], [3.0, 0.0]], [[0.0, 2.0], [-1.0, 0.0]]])
    found = value(loss, [[1.0, 0.0]], [0], state=State(params={"centres": centres}))
    near(found, 0.347684, 1e-4)  # sin 0 is the root of 1e-9


def test_soft_triple():
    # Similarities of class 0: 1 and 0, with weights e/(e + 1) = 0.731059 and 0.268941: 0.731059.
    # Of class 1: -1 and 0, with weights 0.268941 and 0.731059: -0.268941.
    # Logits 0.731059 - 0.5 and -0.268941, difference 0.5: log(1 + e^-0.5) = 0.474077.
    # Each class has one pair of centres at distance sqrt 2: 0.2 * 2 * 1.414214 / (2 * 2 * 1).
    centres = jnp.asarray([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    loss = SoftTriple(centres=2, gamma=1.0, scale=1.0, tau=0.2, margin=0.5)
    found = value(loss, [[1.0, 0.0]], [0], state=State(params={"centres": centres}))
    near(found, 0.474077 + 0.141421)


def test_proxy_synthesis(monkeypatch):
    # Two rows on their proxies. With the rate 1/2 both synthetic rows and proxies are
    # (0.707107, 0.707107), of two classes: the pairs (0, 1) and (1, 0).
    # Real rows: logits 1, 0, 0.707107 twice: log(e + 1 + 2 e^0.707107) - 1 = 1.050848.
    # Synthetic rows: 0.707107 twice, 1 twice: log(2 e^0.707107 + 2 e) - 1 = 1.250535.
    drawn = jnp.float32(0.5), jnp.asarray([0, 1]), jnp.asarray([1, 0])
    monkeypatch.setattr(proxy_synthesis, "draw", lambda *given: drawn)
    loss = ProxySynthesis(scale=1.0)
    near(value(loss, AXES, [0, 1]), (1.050848 + 1.250535) / 2)
    # Four rows of two classes have the same two synthetic classes.
    drawn = jnp.float32(0.5), jnp.arange(4), jnp.asarray([2, 3, 0, 1])
    twice = jnp.repeat(AXES, 2, axis=0)
    near(value(loss, twice, [0, 0, 1, 1]), (1.050848 + 1.250535) / 2)


def test_memvir():
    # First step: logits 1 and 0: log(e + 1) - 1. Second step, with the first in the memory: both
    # rows have the logits 1, 0, 1, 0: log(2 e + 2) - 1.
    loss = MemVir(scale=1.0, steps=1, gap=0)
    state = loss.init(jax.random.key(0), 2, 2, 1)
    given = jnp.asarray([[1.0, 0.0]]), jnp.zeros(1, jnp.int32), AXES, jax.random.key(0)
    first, state = loss.apply(state, *given)
    second, _ = loss.apply(state, *given)
    near([first, second], [0.313262, 1.006409])


def test_cross_batch_memory():
    # Cosine 0.6 of the two classes, 0.1 above the margin; there are no positives within the batch.
    # In the second step, the memory has the same rows: positives 1 - 1, negatives 0.1 again.
    loss = CrossBatchMemory(size=4, weight=0.5)
    state = loss.init(jax.random.key(0), 2, 2, 2)
    given = ABN[:2], jnp.arange(2), AXES, jax.random.key(0)
    first, state = loss.apply(state, *given)
    second, _ = loss.apply(state, *given)
    near([first, second], [0.1, 0.1 + 0.5 * 0.1])


def test_nt_xent():
    # Anchor a: log(1 + e^(0 - 0.6)); anchor b: log(1 + e^(0.8 - 0.6)).
    near(value(NTXent(temperature=1.0), ABN, ABN_LABELS), (0.437488 + 0.798139) / 2)


def test_circle():
    # Positive pair, for both anchors: weight 1.25 - 0.6 = 0.65, exponent -0.65 (0.6 - 0.75).
    # Anchor a: weight 0.25, 0.25 (0 - 0.25) = -0.0625: log(1 + e^(0.0975 - 0.0625)).
    # Anchor b: weight 1.05, 1.05 (0.8 - 0.25) = 0.5775: log(1 + e^(0.0975 + 0.5775)).
    near(value(Circle(gamma=1.0), ABN, ABN_LABELS), (0.710800 + 1.086551) / 2)


def test_lifted_structure():
    # Distances ab sqrt 0.8 = 0.894427, an sqrt 2 = 1.414214, bn sqrt 0.4 = 0.632456.
    # J = 0.894427 + log(e^-0.414214 + e^0.367544) = 0.894427 + log 2.105045 = 1.638764; J^2 / 2.
    near(value(LiftedStructure(), ABN, ABN_LABELS), 1.342774, 5e-5)


def test_smooth_ap():
    # Query a: b before n, sigmoid(-6) = 0.002473: AP 1 / 1.002473.
    # Query b: n before a, sigmoid(2) = 0.880797: AP 1 / 1.880797.
    found = value(SmoothAP(tau=0.1), ABN, ABN_LABELS)
    near(found, 1 - (1 / 1.002473 + 1 / 1.880797) / 2)


def test_triplet_hard_and_semi_hard():
    # a (1, 0), b (0.8, 0.6) against m (0.6, 0.8), n (0, 1). Cosines: ab 0.8, mn 0.8, am 0.6, an 0,
    # bm 0.96, bn 0.6. Batch-hard, margin 0.3: 0.6 - 0.8 + 0.3 = 0.1 for a and n, 0.46 for b and m.
    # Semi-hard: for all pairs the negative of 0.6, because 0.96 is closer than the positive.
    x, y = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], [0, 0, 1, 1]
    near(value(Triplet(margin=0.3), x, y), 0.28)
    near(value(Triplet(margin=0.3, mining="semi_hard"), x, y), 0.1)


def test_triplet_semi_hard_without_a_negative_beyond_the_positive():
    # Cosines: ab 0, am 0.8, an 0.96, bm 0.6, bn 0.28, mn 0.8 * 0.96 + 0.6 * 0.28 = 0.936.
    # (a, b): both negatives are closer, so the farther one: 0.8 - 0 + 0.3. (b, a): 0.28 - 0 + 0.3.
    # (m, n): 0.8 - 0.936 + 0.3 = 0.164. (n, m): 0.96 is closer than 0.936, so 0.28:
    # max(0, 0.28 - 0.936 + 0.3) = 0.
    x, y = [[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.96, 0.28]], [0, 0, 1, 1]
    found = value(Triplet(margin=0.3, mining="semi_hard"), x, y)
    near(found, (1.1 + 0.58 + 0.164 + 0) / 4)


def test_distance_weights():
    # In three dimensions q(d) = d. Distances of the anchor: sqrt 0.8 = 0.894427 (cosine 0.6),
    # sqrt 0.04 = 0.2 (0.98), counted as the cutoff 0.5, and sqrt 3 (-0.5), beyond the upper bound.
    # Weights 1 / 0.894427 = 1.118034 and 2, of 3.118034.
    s = jnp.asarray([[1.0, 0.6, 0.98, -0.5]] * 4)
    _, negative = pairs(jnp.asarray([0, 1, 1, 1]))
    found = Triplet(mining="distance_weighted").weights(s, negative, 3)[0]
    near(found, [0, 1.118034 / 3.118034, 2 / 3.118034, 0], 2e-5)


def test_euclidean_distance_of_unit_vectors():
    near(euclidean(jnp.asarray([-1.0, 0.0, 0.68])), [2, np.sqrt(2), 0.8], 1e-5)
    near(euclidean(jnp.asarray([1.0, 1.0001])), [np.sqrt(1e-5)] * 2, 1e-6)
