"""Two judges of the same pictures: what the study makes of their votes, counted by hand."""

import pytest
import torch
from torch import Tensor

from studies.preference import Judged, rank_correlation


def votes(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_agreement_and_bias_are_counted():
    one = Judged(votes(1, 1, 1, 0, 0, 0, 0, 0), votes(1, 1, 0, 1, 0, 0, 0, 0), list("abcdefgh"))
    found = one.summary
    assert (found["agreement"], found["bias"]) == (0.75, 0.0)
    assert found["missed"] == pytest.approx(1 / 3) and found["false_alarms"] == pytest.approx(1 / 5)
    assert found["bias_interval"][0] < 0 < found["bias_interval"][1]
    both = Judged.all_of({0: one, 1: Judged(votes(0), votes(1), ["a"])})
    assert both.summary["pictures"] == 9 and both.summary["bias"] == pytest.approx(1 / 9)
    assert Judged(votes(0), votes(0), ["a"]).summary["missed"] is None


def test_models_are_ranked_by_their_shares():
    models = {
        i: Judged(votes(*[1] * i, *[0] * (4 - i)), votes(*[1] * (4 - i), *[0] * i), list("abcd")) for i in range(5)
    }
    assert rank_correlation(models) == pytest.approx(-1)
