"""Slow honest twins: plain float64 loops written from the definitions, never from the project's code."""

import math

import torch

# Tuples: hardening and the metric losses, from the equations of the paper and of those that the losses name. Vectors
# are float64 tensors, so that autograd through the loops gives the gradients; negative[i][j] faces anchor i.


def distance(p, q):
    return torch.sqrt(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)))


def dot(p, q):
    return sum(a * b for a, b in zip(p, q, strict=True))


def unit(v):
    return v / torch.sqrt(dot(v, v))


def pull(anchor, positive, negative, j_avg, alpha):
    """The pulled negative, and lambda_0."""
    d_plus, d_minus = distance(anchor, positive), distance(anchor, negative)
    if d_minus <= d_plus:
        return negative, 1.0
    lam = math.exp(-alpha / j_avg)
    lambda_0 = lam + (1 - lam) * d_plus / d_minus
    return anchor + lambda_0 * (negative - anchor), float(lambda_0.detach())


def triplet(anchors, positives, negatives, margin):
    total = 0.0
    for a, p, q in zip(anchors, positives, negatives, strict=True):
        total = total + torch.clamp(distance(a, p) ** 2 - distance(a, q) ** 2 + margin, min=0)
    return total


def npair(anchors, positives, negative, l2_reg):
    """The diagonal of `negative` is no negative, but counts in the regulariser."""
    n = len(anchors)
    total = 0.0
    for i in range(n):
        own = dot(anchors[i], positives[i])
        total = total + torch.log(1 + sum(torch.exp(dot(anchors[i], negative[i][j]) - own) for j in range(n) if j != i))
    return total / n + squared_norms(anchors, negative, l2_reg)


def angular(anchors, positives, negative, angle, l2_reg):
    n = len(anchors)
    t = math.tan(math.pi * angle / 180)
    total = 0.0
    for i in range(n):
        own = 2 * (1 + t**2) * dot(anchors[i], positives[i])
        both = anchors[i] + positives[i]
        terms = [torch.exp(4 * t**2 * dot(both, negative[i][j]) - own) for j in range(n) if j != i]
        total = total + torch.log(1 + sum(terms))
    return total / n + squared_norms(anchors, negative, l2_reg)


def squared_norms(anchors, negative, l2_reg):
    squares = [dot(v, v) for of_anchor in negative for v in of_anchor]
    return 0.25 * l2_reg * (sum(dot(a, a) for a in anchors) / len(anchors) + sum(squares) / len(squares))


def of_other_pairs(i, b):
    """The rows that are no partner of row i, nor itself, among b rows of which i and i + b / 2 are a pair."""
    return [j for j in range(b) if j % (b // 2) != i % (b // 2)]


def contrastive(anchors, positives, negative, margin):
    b = len(anchors)
    attract = [distance(unit(anchors[i]), unit(positives[i])) ** 2 for i in range(b)]
    repel = [
        torch.clamp(margin - distance(unit(anchors[i]), unit(negative[i][j])), min=0) ** 2
        for i in range(b)
        for j in of_other_pairs(i, b)
    ]
    return sum(attract) / len(attract) + sum(repel) / len(repel)


def semihard(anchors, positives, negative, margin):
    b = len(anchors)
    total = 0.0
    for i in range(b):
        plus = distance(unit(anchors[i]), unit(positives[i])) ** 2
        minus = [distance(unit(anchors[i]), unit(negative[i][j])) ** 2 for j in of_other_pairs(i, b)]
        farther = [d for d in minus if d > plus]
        total = total + torch.clamp(plus - (min(farther) if farther else max(minus)) + margin, min=0)
    return total / b


def lifted(anchors, positives, negative, margin):
    """Over the positive pairs seen from either side."""
    b = len(anchors)
    total = 0.0
    for i in range(b):
        both = (i, (i + b // 2) % b)
        repel = [torch.exp(margin - distance(anchors[r], negative[r][j])) for r in both for j in of_other_pairs(r, b)]
        j_pair = torch.log(sum(repel)) + distance(anchors[i], positives[i])
        total = total + torch.clamp(j_pair, min=0) ** 2
    return total / (2 * b)
