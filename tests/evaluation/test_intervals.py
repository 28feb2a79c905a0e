"""Intervals against a loop in plain Python, against known cases and against how often they hold."""

import math
import statistics

import pytest
import torch
from scipy import stats

from sa_diffusers.evaluation.intervals import (
    difference_interval,
    mean_interval,
    share_interval,
    wilson_interval,
)


@pytest.mark.parametrize("groups", [None, list("aabbbcabcc")])
def test_equals_a_loop(groups):
    """Of groups the variance of a ratio, summed by hand; alone, or of one size, scipy's own t interval."""
    values = torch.randn(10).double().tolist()
    mean, names = statistics.fmean(values), groups or range(10)
    sums = [
        sum(v - mean for v, name in zip(values, names, strict=True) if name == one) for one in dict.fromkeys(names)
    ]
    error = math.sqrt(sum(part**2 for part in sums) * len(sums) / (len(sums) - 1)) / 10
    half_width = stats.t.ppf(0.975, len(sums) - 1) * error
    assert mean_interval(values, groups) == pytest.approx((mean - half_width, mean + half_width), rel=1e-12)
    if groups is None:
        assert mean_interval(values) == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval())


@pytest.mark.parametrize("num_groups", [2, 3, 8, 20])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_mean_is_held_as_often_as_it_says_however_few_the_groups(num_groups, skewed):
    """Values of three pictures a prompt; the percentile bootstrap held it in 47 % of 2 prompts, 90 % of 8."""
    drawn = torch.randn(800, num_groups, 1).double()
    prompts = drawn.square() if skewed else 20 + drawn  # chi-squared of 1: a skewness of 2.8
    values = (prompts + 0.3 * torch.randn(800, num_groups, 3)).flatten(1)
    groups, mean = [index // 3 for index in range(3 * num_groups)], 1 if skewed else 20
    held = [low <= mean <= high for low, high in (mean_interval(row, groups) for row in values)]
    assert sum(held) / 800 >= (0.82 if skewed else 0.93)


@pytest.mark.parametrize("num_groups", [2, 8])
def test_differences_are_held_as_often_however_few_the_groups(num_groups):
    draws = 0.5 + torch.randn(400, num_groups, 1).double() + 0.3 * torch.randn(400, num_groups, 3)
    groups = [index // 3 for index in range(3 * num_groups)]
    before = torch.randn(3 * num_groups)
    held = [
        low <= 0.5 <= high
        for low, high in (difference_interval(before + row.flatten(), before, groups) for row in draws)
    ]
    assert sum(held) / 400 >= 0.93


def test_copies_of_an_image_in_a_group_do_not_narrow_the_interval():
    values = torch.rand(20)
    copies, groups = values.repeat_interleave(50), [index for index in range(20) for _ in range(50)]
    assert mean_interval(copies, groups) == pytest.approx(mean_interval(values))
    low, high = mean_interval(copies)
    assert high - low < 0.3 * (mean_interval(values)[1] - mean_interval(values)[0])


@pytest.mark.parametrize(("value", "count"), [(0, 50), (1, 50), (1, 1)])
def test_equal_shares_have_wilsons_width(value, count):
    expected = wilson_interval(float(value), count)
    assert share_interval([value] * count) == pytest.approx(expected)
    if count > 1:  # three images of one prompt are one trial
        assert share_interval([value] * 3 * count, groups=[*range(count)] * 3) == pytest.approx(expected)
    assert share_interval(torch.full((count,), bool(value))) == pytest.approx(expected)


def test_equal_values_of_other_kinds_have_no_width():
    assert mean_interval([0.25] * 4) == (0.25, 0.25) and mean_interval([0.0] * 4) == (0.0, 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_no_share_has_the_same_interval_either_way(sign):
    """Small differences, errors and changes lie in [0, 1] too, and are no shares of it."""
    values = sign * torch.tensor([0.012, 0.015, 0.011], dtype=torch.float64)
    assert mean_interval(values) == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval())


def test_pairs_cancel_what_images_differ_in():
    difficulty, change = 10 * torch.randn(100), 0.1 * torch.randn(100)
    a, b = difficulty + change + 1, difficulty
    low, high = difference_interval(a, b)
    assert 0.9 < low < 1 < high < 1.1
    assert (low, high) == pytest.approx(mean_interval(a.double() - b.double()))
    assert difference_interval(b, a) == pytest.approx((-high, -low))


def test_flips_are_one_more_each_way():
    """Bonett and Price (2012), their adjusted Wald interval, by hand."""
    a, b = [1] * 7 + [0] * 3 + [1] * 40, [0] * 7 + [1] * 3 + [1] * 40
    up, down = 8 / 52, 4 / 52
    half_width = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 52)
    assert difference_interval(a, b) == pytest.approx((up - down - half_width, up - down + half_width))
    assert difference_interval(b, a) == pytest.approx((down - up - half_width, down - up + half_width))
    low, high = difference_interval([1] * 30, [1] * 30)
    assert -0.12 < low == -high < 0 and difference_interval([1] * 30, [0] * 30)[1] == 1
    assert difference_interval([0.5, 0.2], [0.5, 0.2]) == (0, 0)


@pytest.mark.parametrize("value", [1.0, 0.5])
def test_few_flips_are_judged_as_by_the_sign_test(value):
    """Four or five one way have p = .125 or .063, six .031."""
    for flips, clear in ((4, False), (5, False), (6, True)):
        a, b = torch.full((120,), 0.75), torch.full((120,), 0.75)
        if value == 1:
            a, b = a.round(), b.round()
        b[:flips] -= value
        for first, second, sign in ((a, b, 1), (b, a, -1)):
            low, high = sorted(sign * end for end in difference_interval(first, second))
            assert (low > 0) is clear and high > 0
    groups = [*range(40)] * 3  # two pictures of one prompt that flip together are not two flips
    a, b = torch.ones(120), torch.ones(120)
    b[[0, 1, 2, 40, 41, 42]] = 0
    assert difference_interval(a, b)[0] > 0 > difference_interval(a, b, groups=groups)[0]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least one value"),
        ([[1.0, 2.0]], {}, "one an image"),
        ([1.0, math.nan], {}, "NaN or infinity"),
        ([0.1, 0.2], {"groups": ["a"]}, "a group for each of 2"),
    ],
)
def test_wrong_input_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, **options)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="3 and 2"):
        difference_interval([1, 2, 3], [1, 2])


def test_near_zero_a_share_keeps_wilsons_width():
    """It would be narrower for one image of a hundred than for none."""
    ends = [share_interval([1] * count + [0] * (100 - count))[1] for count in (0, 1, 2)]
    assert ends == sorted(ends) and ends[1] >= wilson_interval(0.01, 100)[1]
    low, high = share_interval(torch.linspace(1e-7, 2e-6, 120))
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(wilson_interval(1e-6, 120)[1], rel=0.01)
    assert share_interval([1 + 1e-7, 1.0]) == wilson_interval(1.0, 2)  # but for rounding
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got 0.5 to 1.1"):
        share_interval([0.5, 1.1])


def test_a_single_value_tells_nothing_of_others():
    assert mean_interval([0.25]) is None and mean_interval([7.0]) is None
    assert difference_interval([0.5], [0.25]) is None and difference_interval([1], [0])[0] <= 0


def test_no_end_is_where_no_value_can_be():
    low, high = mean_interval([0.1, 3.0], least=0.0)
    assert low == 0 and high > 10
    assert mean_interval([0.1, 3.0])[0] < -1


def test_images_of_a_single_group_count_singly():
    values = torch.randn(12).tolist()
    assert mean_interval(values, groups=["p"] * 12) == mean_interval(values)


def beta_binomial(mean: float, correlation: float, repetitions: int, groups: list[int]) -> torch.Tensor:
    """Values 0 or 1 [repetitions, N] whose correlation within a group (of N indices in turn) is as given."""
    size = 1 / correlation - 1
    shares = torch.distributions.Beta(mean * size, (1 - mean) * size).sample((repetitions, max(groups) + 1))
    return (torch.rand(repetitions, len(groups)) < shares[:, groups]).double()


OF_PROMPT = [index % 61 for index in range(300)]  # 300 pictures of 61 prompts


@pytest.mark.parametrize("correlation", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("mean", [0.05, 0.5, 0.95])
def test_shares_of_repeated_prompts_hold_as_often_as_they_say(mean, correlation):
    draws = beta_binomial(mean, correlation, 150, OF_PROMPT)
    intervals = [share_interval(row, OF_PROMPT) for row in draws]
    assert sum(low <= mean <= high for low, high in intervals) / 150 >= 0.93
    alone = sum(low <= mean <= high for low, high in (wilson_interval(row.mean().item(), 300) for row in draws)) / 150
    assert correlation == 0.1 or alone < 0.9  # what they would hold as if each picture had a prompt of its own
    width = sum(high - low for low, high in intervals) / 150
    effect = 1 + correlation * 4  # about five pictures a prompt
    assert width < 1.4 * 2 * 1.96 * math.sqrt(mean * (1 - mean) * effect / 300)


def test_groups_bound_what_pictures_are_worth():
    alike = [value for value in (1.0, 0, 0, 1, 1, 0, 1, 1, 0, 0) for _ in range(3)]
    groups = [index // 3 for index in range(30)]
    assert share_interval(alike, groups) == pytest.approx(wilson_interval(0.5, 10))  # a group is one trial
    assert share_interval([0.0] * 30, groups) == pytest.approx(wilson_interval(0.0, 10))  # nothing says otherwise
    assert share_interval(alike, range(30)) == share_interval(alike) == pytest.approx(wilson_interval(0.5, 30))
    spread = [value for index in range(61) for value in ([1.0, 0, 0, 0, 1] if index % 2 else [0.0, 1, 0, 1, 0])]
    low, high = share_interval(spread, [index // 5 for index in range(305)])  # pictures of a prompt differ as any do
    assert high - low < 1.1 * (lambda pair: pair[1] - pair[0])(wilson_interval(0.4, 305))
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got 0 to 2"):
        share_interval([0.0, 2.0])


@pytest.mark.parametrize("gained", [0.0, 0.015])
def test_differences_of_few_flips_hold_as_often_as_they_say(gained):
    draws = torch.rand(400, 120)
    lost = 0.03 - gained
    after = 1 - (draws < lost).double()
    before = 1 - ((draws >= lost) & (draws < 0.03)).double()
    intervals = [difference_interval(*pair) for pair in zip(after, before, strict=True)]
    assert sum(low <= gained - lost <= high for low, high in intervals) / 400 >= 0.94


@pytest.mark.parametrize("count", [4, 5, 8, 20, 48, 120])
def test_five_flips_one_way_never_tell(count):
    """As by the exact sign test, whose p is .0625 for five and .031 for six."""
    for flips in range(min(count, 9) + 1):
        before, after = torch.zeros(count), torch.zeros(count)
        after[:flips] = 1
        low, high = difference_interval(after, before)
        assert (low > 0) == (flips >= 6), (flips, low)
        assert high >= flips / count - 1e-12


def test_differences_of_nearly_nothing_are_none():
    """Four large ones among 196 of 1e-9 tell no more than among as many of 0."""
    few = torch.cat([torch.full((4,), 0.9), torch.zeros(196)])
    noisy = few + torch.linspace(1e-9, 2e-9, 200)
    for values in (few, noisy):
        assert difference_interval(values, torch.zeros(200))[0] <= 0


def test_nothing_seen_begins_at_nothing():
    for count in range(1, 60):
        assert wilson_interval(0.0, count)[0] == 0.0 and wilson_interval(1.0, count)[1] == 1.0
