"""Slow honest twins: plain float64 loops written from the definitions, never from the project's code."""

import math

import torch

from hdml_core.config import Config

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


def ddml(anchors, positives, negative, threshold, sharpness):
    """The sum over pairs with l = 1 or -1, but that each kind of pair counts by its mean."""
    b = len(anchors)

    def g(x):
        return torch.log(1 + torch.exp(sharpness * x)) / sharpness

    def of_pair(p, q, same):
        return g(1 - same * (threshold - distance(p, q) ** 2)) / 2

    of_positives = [of_pair(anchors[i], positives[i], 1) for i in range(b)]
    of_negatives = [of_pair(anchors[i], negative[i][j], -1) for i in range(b) for j in of_other_pairs(i, b)]
    return sum(of_positives) / len(of_positives) + sum(of_negatives) / len(of_negatives)


# The methods. Only weights are taken from the networks, never their forward passes; f is a linear layer.


def linear(layer, v):
    return layer.weight @ v + layer.bias


def batch_norm(layer, vectors):
    m = len(vectors)
    mean = sum(vectors) / m
    variance = sum((v - mean) ** 2 for v in vectors) / m
    return [(v - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias for v in vectors]


def embed(embedder, ys):
    if isinstance(embedder, torch.nn.Sequential):
        norm, fc = embedder
        return [linear(fc, y) for y in batch_norm(norm, ys)]
    return [linear(embedder, y) for y in ys]


def generate(generator, zs):
    first, _, norm, last = generator
    hidden = [torch.clamp(linear(first, z), min=0) for z in zs]
    return [linear(last, h) for h in batch_norm(norm, hidden)]


def accuracy(head, features_with_labels):
    right = []
    for y, label in features_with_labels:
        logits = linear(head, y).tolist()
        right.append(logits.index(max(logits)) == int(label))
    return sum(right) / len(right)


def cross_entropy(head, y, label):
    logits = linear(head, y)
    return torch.log(sum(torch.exp(logit) for logit in logits)) - logits[label]


def decay(networks, config: Config):
    """What J_m has of weight decay."""
    fc = networks.embedder[1] if config.network.embedder_batch_norm else networks.embedder
    weights = [networks.extractor.weight, networks.extractor.bias, fc.weight, fc.bias]
    rate = config.optim.weight_decay if config.hdml.weight_decay_in_j_m else 0.0
    return rate * sum(0.5 * (w**2).sum() for w in weights)


def hdml(networks, x, labels, config: Config, j_avg: float, j_gen_avg: float) -> dict:
    """Every J of one batch by the paper's section 3 and the authors' departures; mean lambda_0 and share pulled."""
    hdml, is_npair = config.hdml, config.loss.name == "npair"
    every_role = hdml.generated_roles == "all"
    n = len(x) // (2 if is_npair else 3)

    ys = [linear(networks.extractor, v) for v in x]
    zs = embed(networks.embedder, ys)
    anchors, positives = zs[:n], zs[n : 2 * n]
    pairs = [(i, j) for i in range(n) for j in range(n)] if is_npair else [(i, i) for i in range(n)]
    row_of = {(i, j): n + j if is_npair else 2 * n + j for i, j in pairs}

    pulled = {(i, j): pull(anchors[i], positives[i], zs[row_of[i, j]], j_avg, hdml.alpha) for i, j in pairs}

    rows = list(zs)
    copies = (anchors + positives) if every_role else []
    y_all = generate(networks.generator, rows + copies + [pulled[pair][0] for pair in pairs])
    y_prime, y_tilde = y_all[: len(zs)], y_all[len(zs) :]
    z_tilde = embed(networks.embedder, y_tilde)
    if every_role:
        anchors_syn, positives_syn = z_tilde[:n], z_tilde[n : 2 * n]
    else:
        anchors_syn, positives_syn = anchors, positives
    negative_syn = dict(zip(pairs, z_tilde[len(copies) :], strict=True))

    if is_npair:
        real_grid = [[positives[j] for j in range(n)] for _ in range(n)]
        syn_grid = [[negative_syn[i, j] for j in range(n)] for i in range(n)]
        j_m = npair(anchors, positives, real_grid, config.loss.l2_reg)
        j_syn = npair(anchors_syn, positives_syn, syn_grid, config.loss.l2_reg)
    else:
        j_m = triplet(anchors, positives, zs[2 * n :], config.loss.margin)
        j_syn = triplet(anchors_syn, positives_syn, [negative_syn[p] for p in pairs], config.loss.margin)

    j_m = j_m + decay(networks, config)

    w_real = math.exp(-hdml.beta / j_gen_avg)
    j_recon = sum(((a - b) ** 2).sum() for a, b in zip(y_prime, ys, strict=True))
    if hdml.recon_reduction == "mean":
        j_recon = j_recon / len(ys)

    def mean_cross_entropy(features, of_rows):
        terms = [cross_entropy(networks.head, y, labels[row]) for y, row in zip(features, of_rows, strict=True)]
        return sum(terms) / len(terms)

    of_negatives = mean_cross_entropy(y_tilde[len(copies) :], [row_of[pair] for pair in pairs])
    if not every_role:
        j_soft = of_negatives
    elif is_npair:
        j_soft = of_negatives + mean_cross_entropy(y_tilde[:n], range(n))
    else:
        j_soft = mean_cross_entropy(y_tilde, range(3 * n))

    synthetic_of = dict(zip(pairs, y_tilde[len(copies) :], strict=True))
    true_negatives = [pair for pair in pairs if not is_npair or pair[0] != pair[1]]
    factors = [pulled[pair][1] for pair in true_negatives]
    return {
        "j_m": j_m,
        "j_syn": j_syn,
        "j_metric": w_real * j_m + (1 - w_real) * j_syn,
        "j_recon": j_recon,
        "j_soft": j_soft,
        "j_gen": hdml.recon_weight * j_recon + hdml.lambda_soft * j_soft,
        "j_class": mean_cross_entropy(ys, range(len(ys))),
        "lambda_0_mean": sum(factors) / len(factors),
        "pulled_share": sum(f < 1 for f in factors) / len(factors),
        "synthetic_accuracy": accuracy(networks.head, [(synthetic_of[p], labels[row_of[p]]) for p in true_negatives]),
        "real_accuracy": accuracy(networks.head, zip(ys, labels, strict=True)),
    }


def daml(networks, x, config: Config) -> dict:
    """Every J of one batch by DAML's definitions, the generator fed with each tuple's features end to end."""
    is_npair = config.loss.name == "npair"
    n = len(x) // (2 if is_npair else 3)

    ys = [linear(networks.extractor, v) for v in x]
    zs = embed(networks.embedder, ys)
    pairs = [(i, j) for i in range(n) for j in range(n)] if is_npair else [(i, i) for i in range(n)]
    row_of = {(i, j): n + j if is_npair else 2 * n + j for i, j in pairs}

    def generated(y_negative, y_anchor, y_positive):
        _, second, _, third = networks.generator.rest
        hidden = torch.clamp(linear(networks.generator.first, torch.cat([y_negative, y_anchor, y_positive])), min=0)
        return linear(third, torch.clamp(linear(second, hidden), min=0))

    y_tilde = {(i, j): generated(ys[row_of[i, j]], ys[i], ys[n + i]) for i, j in pairs}
    z_tilde = dict(zip(pairs, embed(networks.embedder, list(y_tilde.values())), strict=True))

    def metric_loss(negative_of):
        if is_npair:
            grid = [[negative_of[i, j] for j in range(n)] for i in range(n)]
            return npair(zs[:n], zs[n:], grid, config.loss.l2_reg)
        return triplet(zs[:n], zs[n : 2 * n], [negative_of[pair] for pair in pairs], config.loss.margin)

    j_m = metric_loss({pair: zs[row] for pair, row in row_of.items()}) + decay(networks, config)
    j_syn = metric_loss(z_tilde)

    negatives = [pair for pair in pairs if not is_npair or pair[0] != pair[1]]
    hard = [distance(y_tilde[i, j], ys[i]) ** 2 for i, j in negatives]
    reg = [distance(y_tilde[i, j], ys[row_of[i, j]]) ** 2 for i, j in negatives]
    adv = [
        torch.clamp(distance(z_tilde[i, j], zs[i]) ** 2 - distance(zs[i], zs[n + i]) ** 2 - config.daml.margin, min=0)
        for i, j in negatives
    ]
    j_hard, j_reg, j_adv = (sum(terms) / len(terms) for terms in (hard, reg, adv))
    return {
        "j_m": j_m,
        "j_syn": j_syn,
        "j_metric": j_syn + decay(networks, config),
        "j_hard": j_hard,
        "j_reg": j_reg,
        "j_adv": j_adv,
        "j_gen": j_hard + config.daml.lambda_reg * j_reg + config.daml.lambda_adv * j_adv,
    }
