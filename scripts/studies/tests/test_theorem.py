"""Theorem 1 and Corollary 1 on tables of probabilities; the optimum and the Fisher against torch's autograd."""

import numpy as np
import pytest
import torch

from studies.theorem import (
    CLASSES,
    CONCEPT,
    EVERY,
    VALUES,
    bound_rows,
    divergence,
    features_of,
    fisher,
    gap,
    log_probabilities,
    objective_rows,
    optimum,
    surrogates,
)


def table(kind: str, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(VALUES), CLASSES), features_of(kind, rng)


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_the_gap_is_the_divergence_where_the_model_fits_anything(kind):
    p, features = table(kind)
    original = optimum(features, EVERY * p)
    np.testing.assert_allclose(np.exp(log_probabilities(features, original)), p, atol=1e-12)
    for q in surrogates(p).values():
        found = gap(features, optimum(features, CONCEPT * q, original), original, p)
        expected = -sum(  # in plain loops
            CONCEPT[c, 0] * p[c, x] * np.log(p[c, x] / q[c, x]) for c in range(CLASSES) for x in range(VALUES)
        )
        assert found == pytest.approx(expected, abs=1e-11) and found < 0


def test_without_room_the_gap_lies_between_the_models_and_the_theorem_needs_an_optimum_of_the_concept():
    p, features = table("few")
    alone, joint = (optimum(features, weights * p) for weights in (CONCEPT, EVERY))
    for q in surrogates(p).values():
        theta = optimum(features, CONCEPT * q, alone)
        learned = np.exp(log_probabilities(features, alone))
        found = gap(features, theta, alone, p)
        assert found == pytest.approx(-divergence(CONCEPT, learned, log_probabilities(features, theta)), abs=1e-11)
        assert found < 0
    assert gap(features, optimum(features, CONCEPT * surrogates(p)["2% uniform"], joint), joint, p) > 0.001


def test_optimum_and_fisher_are_those_of_autograd():
    p, features = table("few")
    original = optimum(features, EVERY * p)
    given, at = torch.from_numpy(features), torch.from_numpy(original)
    log_p, slow = torch.from_numpy(log_probabilities(features, original)), torch.zeros_like(at)
    for c in range(CLASSES):
        for x in range(VALUES):
            theta = at.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((given @ theta).log_softmax(1)[c, x], theta)
            slow += log_p[c, x].exp() * gradient.square() / CLASSES
    np.testing.assert_allclose(fisher(features, original), slow, rtol=1e-10)

    penalty, weights = 0.3 * slow, CONCEPT / VALUES + np.zeros_like(p)
    theta = torch.from_numpy(optimum(features, weights, original, penalty.numpy())).requires_grad_()
    objective = (torch.from_numpy(weights) * (given @ theta).log_softmax(1)).sum()
    objective = objective - (penalty * (theta - at).square()).sum()  # concave: no gradient is the optimum
    (gradient,) = torch.autograd.grad(objective, theta)
    np.testing.assert_allclose(gradient, np.zeros_like(original), atol=1e-12)
    assert not np.allclose(theta.detach(), original, atol=0.01)


def test_a_surrogate_that_leaves_a_value_out_is_refused():
    p, features = table("own")
    with pytest.raises(ValueError, match="expected a weight for every value of a class"):
        optimum(features, CONCEPT * np.eye(VALUES)[:CLASSES], optimum(features, EVERY * p))


def test_rows_tell_of_every_model_and_strength():
    rows = bound_rows(1)
    assert len(rows) == 16 and max(row["difference"] for row in rows if row["weights"] != "few") < 1e-11
    assert [row["gap above 0"] for row in rows[8:12]] == ["0 of 1"] * 4
    rows = objective_rows(1)
    shares = [row["share of the gap"] for row in rows[:5]]
    assert shares[0] == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert rows[0]["KL of the rest"] < 1e-12 < rows[5]["KL of the rest"]
