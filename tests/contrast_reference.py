"""ContrastMask's loss pixel by pixel."""

import math

import numpy as np


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def nce_by_hand(positives, negatives, t, official):
    total = 0.0
    for a in positives:
        own = math.exp(a) if official else math.exp(a / t)
        total -= math.log(math.exp(a / t) / (own + sum(math.exp(b / t) for b in negatives)))
    return total / len(positives)


def loss_by_hand(p, sets, official=False):
    """With all pixels as keys; p: (R, D, M, M)."""
    kept = [n for n in range(len(p)) if all(int(x[n].sum()) >= 5 for x in sets.keys)]

    def pixels(n, x):
        return [p[n, :, i, j] for i, j in np.argwhere(x[n].numpy())]

    def query(x):
        return np.mean([np.mean(pixels(n, x), axis=0) for n in kept], axis=0)

    keys = [[v for n in kept for v in pixels(n, x)] for x in sets.keys]
    easy_in, hard_in, easy_out, hard_out = keys
    total = 0.0
    for q, (ea, eb), (ha, hb) in (
        (query(sets.inside), (easy_in, easy_out), (hard_in, hard_out)),
        (query(sets.outside), (easy_out, easy_in), (hard_out, hard_in)),
    ):
        for a, b, t in ((ea, eb, 0.3), (ha, hb, 0.7)):
            s_a, s_b = ([cosine(q, v - q) for v in x] for x in (a, b))
            total += nce_by_hand(s_a, s_b, t, official)
    return total
