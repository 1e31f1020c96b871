"""Metric losses as loops over single pairs, in float64 with NumPy; independent of `afa.losses`.

Each function takes rows x, labels y, proxies p, the settings c of the loss, and what is given
besides.
"""

import dataclasses
from typing import Any

import numpy as np

Rows = np.ndarray


@dataclasses.dataclass
class Given:
    """What a loss depends on besides rows, labels and proxies.

    Attributes:
      at: rows at which weights without a gradient are computed.
      centres: parameters of shape (classes, K, d).
      history: (rows, labels, proxies) of the previous steps, oldest first.
      drawn: random rate and pairs of proxy synthesis.
    """

    at: Any = None
    centres: Any = None
    history: Any = ()
    drawn: Any = None


def cross_entropy(logits: Rows, label: int) -> float:
    largest = logits.max()
    return largest + np.log(np.exp(logits - largest).sum()) - logits[label]


def unit(x: Rows) -> Rows:
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def rows_of(y):
    """Yields each row with its positives and its negatives."""
    for i, label in enumerate(y):
        others = [j for j in range(len(y)) if j != i]
        yield i, [j for j in others if y[j] == label], [j for j in others if y[j] != label]


def mean(values) -> float:
    """Mean; 0 of nothing."""
    return float(np.mean(values)) if len(values) else 0.0


def distance(a: Rows, b: Rows) -> float:
    """Euclidean distance of unit vectors, with the documented constant."""
    return float(np.sqrt(2 - 2 * (a @ b) + 1e-5))


# ---- classes and proxies -------------------------------------------------------------------------


def norm_softmax(x, y, p, c, given):
    return mean([cross_entropy(p @ x[i] / c.temperature, y[i]) for i in range(len(y))])


def proxy_nca(x, y, p, c, given):
    losses = []
    for row, label in zip(x, y, strict=True):
        squared = np.array([((row - proxy) ** 2).sum() for proxy in p])
        losses.append(cross_entropy(-squared / c.temperature, label))
    return mean(losses)


def arcface(x, y, p, c, given):
    losses = []
    for row, label in zip(x, y, strict=True):
        if c.centres == 1:
            cosine = p @ row
        else:
            cosine = np.array([max(unit(each) @ row) for each in given.centres])
        angle = np.arccos(cosine[label])
        beyond = angle + c.margin > np.pi
        turned = cosine[label] - c.margin * np.sin(c.margin)
        cosine[label] = turned if beyond else np.cos(angle + c.margin)
        losses.append(cross_entropy(c.scale * cosine, label))
    return mean(losses)


def cosface(x, y, p, c, given):
    losses = []
    for row, label in zip(x, y, strict=True):
        own = np.exp(c.scale * (p[label] @ row - c.margin))
        others = [np.exp(c.scale * (p[k] @ row)) for k in range(len(p)) if k != label]
        losses.append(-np.log(own / (own + sum(others))))
    return mean(losses)


def soft_triple(x, y, p, c, given):
    w, losses = unit(given.centres), []
    classes, count, _ = w.shape
    for row, label in zip(x, y, strict=True):
        similarity = np.zeros(classes)
        for k in range(classes):
            s = w[k] @ row
            share = np.exp(s / c.gamma) / np.exp(s / c.gamma).sum()
            similarity[k] = (share * s).sum()
        similarity[label] -= c.margin
        losses.append(cross_entropy(c.scale * similarity, label))
    apart = [
        distance(w[k, a], w[k, b])
        for k in range(classes) for a in range(count) for b in range(a + 1, count)
    ]  # fmt: skip
    if count == 1:
        return mean(losses)
    return mean(losses) + c.tau * sum(apart) / (classes * count * (count - 1))


def proxy_anchor(x, y, p, c, given):
    positive_terms, negative_terms = [], []
    for label, proxy in enumerate(p):
        cosine = x @ proxy
        if (y == label).any():
            terms = np.exp(-c.scale * (cosine[y == label] - c.margin))
            positive_terms.append(np.log(1 + terms.sum()))
        negative_terms.append(np.log(1 + np.exp(c.scale * (cosine[y != label] + c.margin)).sum()))
    return mean(positive_terms) + mean(negative_terms)


def proxy_synthesis(x, y, p, c, given):
    rate, i, j = given.drawn
    rows, labels, proxies, class_of = list(x), list(y), list(p), {}
    for a, b in zip(i, j, strict=True):
        if y[a] == y[b]:
            continue
        if (y[a], y[b]) not in class_of:
            class_of[y[a], y[b]] = len(proxies)
            proxies.append(unit(rate * p[y[a]] + (1 - rate) * p[y[b]]))
        rows.append(unit(rate * x[a] + (1 - rate) * x[b]))
        labels.append(class_of[y[a], y[b]])
    every = np.stack(proxies)
    pairs = zip(rows, labels, strict=True)
    return mean([cross_entropy(c.scale * every @ row, label) for row, label in pairs])


def memvir(x, y, p, c, given):
    rows, labels, proxies = list(x), list(y), [p]
    for number in range(1, c.steps + 1):
        age = number * (c.gap + 1)
        if age <= len(given.history) - c.warmup:
            old_rows, old_labels, old_proxies = given.history[-age]
            rows += list(old_rows)
            labels += [len(p) * len(proxies) + each for each in old_labels]
            proxies.append(old_proxies)
    every = np.concatenate(proxies)
    pairs = zip(rows, labels, strict=True)
    return mean([cross_entropy(c.scale * every @ row, label) for row, label in pairs])


# ---- pairs ---------------------------------------------------------------------------------------


def contrastive(x, y, p, c, given):
    s = x @ x.T
    positive_terms = [1 - s[i, j] for i, positive, _ in rows_of(y) for j in positive]
    negative_terms = [s[i, j] - c.margin for i, _, negative in rows_of(y) for j in negative]
    return mean(positive_terms) + mean([each for each in negative_terms if each > 0])


def cross_batch_memory(x, y, p, c, given):
    newest_first = reversed(given.history[c.warmup :])
    queue = [pair for rows, labels, _ in newest_first for pair in zip(rows, labels, strict=True)][
        : c.size
    ]
    positive_terms, negative_terms = [], []
    for row, own in zip(x, y, strict=True):
        for other, label in queue:
            if label == own:
                positive_terms.append(1 - row @ other)
            elif row @ other > c.margin:
                negative_terms.append(row @ other - c.margin)
    memory = mean(positive_terms) + mean(negative_terms)
    return contrastive(x, y, p, c, given) + c.weight * memory


def distance_probabilities(x, y, i, c) -> dict[int, float]:
    """Probability of each negative of row i in distance-weighted mining."""
    dim = x.shape[1]
    negatives = [j for j in range(len(y)) if y[j] != y[i]]
    weights = {}
    for j in negatives:
        d = distance(x[i], x[j])
        if d < c.upper_bound:
            d = max(d, c.cutoff)
            weights[j] = 1 / (d ** (dim - 2) * (1 - d * d / 4) ** ((dim - 3) / 2))
    weights = weights or dict.fromkeys(negatives, 1.0)
    total = sum(weights.values())
    return {j: weight / total for j, weight in weights.items()}


def triplet(x, y, p, c, given):
    """With distance-weighted mining, the expected loss."""
    s, terms = x @ x.T, []
    for i, positive, negative in rows_of(y):
        if not positive or not negative:
            continue
        if c.mining == "hard":
            terms.append(max(0, max(s[i, negative]) - min(s[i, positive]) + c.margin))
            continue
        for j in positive:
            if c.mining == "semi_hard":
                beyond = [s[i, k] for k in negative if s[i, k] < s[i, j]]
                chosen = {(max(beyond) if beyond else min(s[i, negative])): 1.0}
            else:
                found = distance_probabilities(given.at, y, i, c)
                chosen = {s[i, k]: weight for k, weight in found.items()}
            terms.append(sum(w * max(0, each - s[i, j] + c.margin) for each, w in chosen.items()))
    return mean(terms)


def lifted_structure(x, y, p, c, given):
    terms = []
    for i in range(len(y)):
        for j in range(i + 1, len(y)):
            if y[i] != y[j]:
                continue
            total = sum(
                np.exp(c.margin - distance(x[a], x[k]))
                for a in (i, j) for k in range(len(y)) if y[k] != y[a]
            )  # fmt: skip
            if total > 0:
                terms.append(max(0, distance(x[i], x[j]) + np.log(total)) ** 2 / 2)
            else:
                terms.append(0)
    return mean(terms)


def multi_similarity(x, y, p, c, given):
    s, losses = x @ x.T, []
    for i, positive, negative in rows_of(y):
        hard_positive = [
            j for j in positive if negative and s[i, j] < max(s[i, negative]) + c.margin
        ]
        hard_negative = [
            j for j in negative if positive and s[i, j] > min(s[i, positive]) - c.margin
        ]
        near = np.exp(-c.alpha * (s[i, hard_positive] - c.threshold)).sum()
        far = np.exp(c.beta * (s[i, hard_negative] - c.threshold)).sum()
        losses.append(np.log(1 + near) / c.alpha + np.log(1 + far) / c.beta)
    return mean(losses)


def circle(x, y, p, c, given):
    s, fixed, losses, m = x @ x.T, given.at @ given.at.T, [], c.margin
    for i, positive, negative in rows_of(y):
        if not positive or not negative:
            continue
        near = sum(
            np.exp(-c.gamma * max(0, 1 + m - fixed[i, j]) * (s[i, j] - (1 - m))) for j in positive
        )
        far = sum(np.exp(c.gamma * max(0, fixed[i, j] + m) * (s[i, j] - m)) for j in negative)
        losses.append(np.log(1 + near * far))
    return mean(losses)


def nt_xent(x, y, p, c, given):
    e, losses = np.exp(x @ x.T / c.temperature), []
    for i, positive, negative in rows_of(y):
        losses += [-np.log(e[i, j] / (e[i, j] + e[i, negative].sum())) for j in positive]
    return mean(losses)


def supcon(x, y, p, c, given):
    e, losses = np.exp(x @ x.T / c.temperature), []
    for i, positive, negative in rows_of(y):
        if positive:
            total = e[i, positive + negative].sum()
            losses.append(mean([-np.log(e[i, j] / total) for j in positive]))
    return mean(losses)


def smooth_ap(x, y, p, c, given):
    s, losses = x @ x.T, []

    def step(difference):
        return 1 / (1 + np.exp(-difference / c.tau))

    for i, positive, negative in rows_of(y):
        precision = []
        for j in positive:
            rank = 1 + sum(step(s[i, k] - s[i, j]) for k in positive if k != j)
            precision.append(rank / (rank + sum(step(s[i, k] - s[i, j]) for k in negative)))
        if precision:
            losses.append(1 - mean(precision))
    return mean(losses)


REFERENCES = {
    each.__name__: each
    for each in (
        norm_softmax, proxy_nca, arcface, cosface, soft_triple, proxy_anchor, proxy_synthesis,
        memvir, contrastive, cross_batch_memory, triplet, lifted_structure, multi_similarity,
        circle, nt_xent, supcon, smooth_ap,
    )
}  # fmt: skip
