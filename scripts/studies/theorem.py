"""Theorem 1 and Corollary 1 of Selective Amnesia on models so small that every expectation is a sum.

A model is log-linear: logits [C, X] = features [C, X, D] theta. What it learns is a table of weights [C, X], p(c)
times the distribution of x, and every optimum is found by Newton's method.
"""

from typing import Any

import numpy as np


CLASSES, VALUES, FEW = 5, 12, 6  # FEW: weights of a model that cannot fit what it learns
CONCEPT = np.array([[0.7, 0.3, 0, 0, 0]]).T  # p_f(c), [C, 1]
RETAINED = np.array([[0, 0, 1, 1, 1]]).T / 3  # p_r(c)
EVERY = np.full((CLASSES, 1), 1 / CLASSES)  # p(c)


def features_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Features [C, X, D] of a model: `own` logits of each class, `shared` ones added to those, or `few` weights."""
    if kind == "few":
        return rng.normal(size=(CLASSES, VALUES, FEW))
    logits = np.eye(VALUES)[:, 1:]  # the first stays at 0
    own = np.einsum("cd,xe->cxde", np.eye(CLASSES), logits).reshape(CLASSES, VALUES, -1)
    return own if kind == "own" else np.concatenate([own, np.tile(logits, (CLASSES, 1, 1))], 2)


def log_probabilities(features: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """log p(x|theta, c), [C, X]."""
    logits = features @ theta
    return logits - np.logaddexp.reduce(logits, 1, keepdims=True)


def scores(features: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Gradients of log p(x|theta, c), [C, X, D]."""
    return features - np.einsum("cx,cxd->cd", np.exp(log_probabilities(features, theta)), features)[:, None]


def fisher(features: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """F_i = E[(d log p(x|theta, c) / d theta_i)^2], x of the model itself and c of all classes, [D]."""
    return np.einsum("cx,cxd->d", EVERY * np.exp(log_probabilities(features, theta)), scores(features, theta) ** 2)


def optimum(
    features: np.ndarray, weights: np.ndarray, start: np.ndarray | None = None, penalty: np.ndarray | None = None
) -> np.ndarray:
    """The theta that maximises sum of weights log p(x|theta, c) - sum of penalty (theta - start)^2.

    Args:
        weights: [C, X], not negative.
        start: of the search, and the penalty's centre; of several optima one near it is found. None: 0.
        penalty: of each weight, [D]; None: 0.

    Raises:
        ValueError: a class has weights, but none of some value: its best logit is -inf.
    """
    if ((weights > 0).any(1) & (weights == 0).any(1)).any():
        raise ValueError("expected a weight for every value of a class, got 0 for some; mix in a little of uniform")
    theta = start = np.zeros(features.shape[2]) if start is None else start
    penalty = np.zeros_like(start) if penalty is None else penalty

    def objective(theta: np.ndarray) -> float:
        return (weights * log_probabilities(features, theta)).sum() - penalty @ (theta - start) ** 2

    gradient = step = np.inf
    while np.max(abs(gradient)) > 1e-13 and np.max(abs(step)) > 1e-12:
        score, spread = scores(features, theta), np.exp(log_probabilities(features, theta))
        gradient = np.einsum("cx,cxd->d", weights, score) - 2 * penalty * (theta - start)
        curvature = np.einsum("cx,cxd,cxe->de", weights.sum(1, keepdims=True) * spread, score, score)
        step = np.linalg.lstsq(curvature + np.diag(2 * penalty), gradient, rcond=1e-13)[0]
        while objective(theta + step) < objective(theta) - 1e-15:
            step = step / 2
        theta = theta + step
    return theta


def surrogates(p: np.ndarray) -> dict[str, np.ndarray]:
    """q(x|c) by name, each [C, X]."""
    uniform = np.full_like(p, 1 / VALUES)
    return {
        "uniform": uniform,
        "half uniform": 0.5 * p + 0.5 * uniform,
        "2% uniform": 0.98 * p + 0.02 * uniform,
        "another class": np.roll(p, 2, 0),
    }


def gap(features: np.ndarray, theta: np.ndarray, original: np.ndarray, p: np.ndarray) -> float:
    """E_{p(x|c) p_f(c)}[log p(x|theta, c) - log p(x|original, c)], what forgetting took from the log-likelihood."""
    change = log_probabilities(features, theta) - log_probabilities(features, original)
    return float((CONCEPT * p * change).sum())


def divergence(of: np.ndarray, p: np.ndarray, log_q: np.ndarray) -> float:
    """E_{c of `of`} KL(p(x|c) || q(x|c))."""
    return float((of * p * (np.log(p) - log_q)).sum())


def bound_rows(tables: int) -> list[dict[str, Any]]:
    """The two statements with each model and surrogate, over random p(x|c).

    `original fitted to` says whose likelihood theta* maximises: all classes', as models are trained, or the concept's
    alone, which is what the theorem asks for. `difference` is the largest |gap + KL(p, q)|.
    """
    rows = []
    for kind, fitted in (("own", "all"), ("shared", "all"), ("few", "the concept"), ("few", "all")):
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in range(tables):
            rng = np.random.default_rng(seed)
            p, features = rng.dirichlet(np.ones(VALUES), CLASSES), features_of(kind, rng)
            original = optimum(features, (EVERY if fitted == "all" else CONCEPT) * p)
            for name, q in surrogates(p).items():
                theta = optimum(features, CONCEPT * q, original)
                pair = gap(features, theta, original, p), -divergence(CONCEPT, p, np.log(q))
                found.setdefault(name, []).append(pair)
        for name, pairs in found.items():
            gaps, bounds = np.array(pairs).T
            rows.append(
                {
                    "weights": kind,
                    "original fitted to": fitted,
                    "surrogate": name,
                    "gap": gaps.mean(),
                    "-KL(p, q)": bounds.mean(),
                    "difference": abs(gaps - bounds).max(),
                    "gap above 0": f"{(gaps > 1e-9).sum()} of {tables}",
                }
            )
    return rows


def objective_rows(tables: int) -> list[dict[str, Any]]:
    """How much of Corollary 1's gap the whole objective reaches, surrogate, EWC and replay, with shared weights."""
    rows = []
    for replay in (1, 0):
        for ewc_lambda in (0, 0.1, 1, 10, 100):
            found = []
            for seed in range(tables):
                rng = np.random.default_rng(seed)
                p, features = rng.dirichlet(np.ones(VALUES), CLASSES), features_of("shared", rng)
                original = optimum(features, EVERY * p)
                learned = np.exp(log_probabilities(features, original))
                weights = CONCEPT / VALUES + replay * RETAINED * learned
                theta = optimum(features, weights, original, ewc_lambda * fisher(features, original))
                log_p = log_probabilities(features, theta)
                reached = -gap(features, theta, original, p) / divergence(CONCEPT, p, np.full_like(p, -np.log(VALUES)))
                found.append((reached, divergence(RETAINED, p, log_p)))
            reached, lost = np.mean(found, 0)
            rows.append({"lambda": ewc_lambda, "replay": replay, "share of the gap": reached, "KL of the rest": lost})
    return rows
