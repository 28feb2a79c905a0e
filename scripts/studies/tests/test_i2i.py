"""The study of models that complete pictures: a row runs, its model is measured, and both stand in the tables."""

import json
from types import SimpleNamespace

import pytest
import torch

from sa_diffusers.data.picture_groups import read_group
from sa_diffusers.evaluation.completion import completed, masked_errors, measured
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import get_family
from sa_diffusers.families.architectures import build_masked_autoencoder
from studies.i2i import probes
from studies.i2i.figures import save_figures
from studies.i2i.rows import FISHER_OF, LINES, PROBED, ROWS
from studies.i2i.sections import at_forgetting, bars, compared, table
from studies.i2i.smile import estimate, smile
from studies.i2i.table import I2IConfig, run_study


def tiny(seed: int):
    """8 x 8 patches of one pixel, as the masks of the curves need."""
    options = SimpleNamespace(
        image_size=8, patch_size=1, hidden_size=16, num_layers=1, num_heads=2, decoder_hidden_size=8,
        decoder_num_layers=1, initializer_range=0.2,
    )  # fmt: skip
    pipeline = build_masked_autoencoder(options, 1, seed)
    pipeline.mae.eval()
    return get_family(pipeline)


@pytest.fixture(scope="module")
def bench():
    names = {"forget": "2,5", "retain": "0,1", "other": "7"}
    groups = {name: read_group(f"digits8x8:{classes}", name, 8, (40, 15)) for name, classes in names.items()}
    torch.manual_seed(0)
    judge = DigitClassifier({"digit": [str(i) for i in range(10)]}, image_size=8, kernel_size=3, padding=1).eval()
    return probes.Bench(groups, ClassifierJudge(judge, "digit", 2), tiny(0), tiny(1))


def test_rows_differ_and_those_that_are_compared_exist():
    assert len({json.dumps(changes, sort_keys=True) for changes in ROWS.values()}) == len(ROWS)
    assert {FISHER_OF, *PROBED, *(row for line in LINES.values() for row in line)} <= {"original", *ROWS}


def test_smile_is_its_formula_and_tells_pairs_from_noise():
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * 3
    clipped = [scores[i, j].clamp(-1, 1).exp().double() for i in range(6) for j in range(6) if i != j]
    expected = scores.diagonal().double().mean() - torch.stack(clipped).mean().log()
    assert estimate(scores, 1.0) == pytest.approx(expected.item(), rel=1e-6)
    one, other = torch.randn(2, 600, 4, generator=torch.Generator().manual_seed(1))
    pairs, noise = (one, one + 0.3 * other), (one, other)
    found = [smile(tuple(p[:400] for p in both), tuple(p[400:] for p in both), 0) for both in (pairs, noise)]
    assert found[0]["tau 5"] > 1 and abs(found[1]["tau 5"]) < 0.1


def test_a_part_of_a_group_has_so_many_of_each_class(bench):
    part = bench.part("forget", 4)
    assert part.test.labels.bincount()[[2, 5]].tolist() == [4, 4] and len(part.test) == 8
    assert bench.part("forget", 7, train=True).test.images.unique(dim=0).shape[0] == 14


def test_the_second_generation_of_the_truth_is_what_the_first_model_makes_around_it(bench):
    truth, filled, hole = completed(bench.base, bench.groups["forget"], "ring", 0)
    expected, _ = measured(truth, filled, hole, bench.groups["forget"], [bench.judge.classifier])
    assert probes.second_generation(bench, tiny(2), (truth, truth)) == pytest.approx(expected)


def test_membership_is_the_share_of_pairs_in_order(bench):
    train, test = (bench.fills(bench.base, side) for side in (True, False))
    errors = [masked_errors(*pair, bench.hole) for pair in (train, test)]
    right = (errors[0][:, None] < errors[1][None]).double().mean().item()
    assert probes.membership(bench, train, test) == pytest.approx(right)


def test_a_new_map_and_a_short_training_lower_the_error(bench):
    before = masked_errors(*bench.fills(bench.base, train=False), bench.hole).mean().item()
    features = probes.latent_search(bench, bench.base, lambda b: bench.base.features(bench.base.module, b)[0], 0.03)
    assert features < before and probes.relearned(bench, bench.base, 0, 3e-3) < before
    after = masked_errors(*bench.fills(bench.base, train=False), bench.hole).mean().item()
    assert after == before  # the model itself is left as it was


def test_features_through_the_decoder_are_what_the_model_fills_in(bench):
    truth, filled = bench.fills(bench.base, train=False)
    hole = bench.hole.expand_as(truth)
    with torch.no_grad():
        batch = bench.base.batch(truth, [probes.Condition(mask="half")] * len(truth))
        made = probes.decoded(bench.base.module, bench.base.features(bench.base.module, batch)[0], bench.base)
    torch.testing.assert_close(made[hole].clamp(-1, 1), filled[hole])


def test_only_a_model_that_differs_is_told_from_the_retrained_one(bench):
    assert probes.conspicuousness(bench, bench.retrained, 0) == pytest.approx(0.5, abs=0.02)
    assert probes.conspicuousness(bench, bench.base, 0) > 0.9


def test_pictures_of_all_models_are_saved(bench, tmp_path):
    found = {"original": {"0": {"probes": {"curves": probes.curves(bench, bench.base)}}}}
    save_figures(bench, found, {"original": bench.base}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fills.png", "curves.png", "tsne.png"}
    forget = found["original"]["0"]["probes"]["curves"]["left 25"]["forget"]
    truth, filled, hole = completed(bench.base, bench.groups["forget"], "left 25", 0)
    assert forget["masked_mse"] == pytest.approx(masked_errors(truth, filled, hole).mean().item())


def side(forget: float, retain: float, third: float) -> dict:
    errors = zip(("forget", "retain", "third"), (forget, retain, third), strict=True)
    return {name: {"masked_mse": error, "accuracy": 0.9, "num_images": 10} for name, error in errors}


@pytest.fixture
def found():
    """Two seeds: max-loss breaks the third group, further training too."""
    values = {
        "noise, alpha 0.02": [side(0.2, 0.1, 0.2), side(0.2, 0.1, 0.2)],
        "noise, alpha 0.25": [side(0.4, 0.2, 0.3), side(0.4, 0.2, 0.3)],
        "retain-only": [side(0.25, 0.1, 0.3), side(0.25, 0.1, 0.31)],
        "max-loss, alpha 0.05": [side(0.45, 0.1, 0.5), side(0.45, 0.1, 0.51)],
    }
    before = side(0.2, 0.1, 0.2)
    return {row: {str(i): {"before": before, "after": s} for i, s in enumerate(runs)} for row, runs in values.items()}


def test_methods_are_compared_where_they_forget_equally(found):
    assert at_forgetting(found, "noise", "0", 0.3) == pytest.approx({"retain": 0.15, "third": 0.25})
    assert at_forgetting(found, "noise", "0", 0.5) is None and at_forgetting(found, "other", "0", 0.3) is None
    ours, other, rival = compared(found, ("noise", "other", "max-loss"), lambda before: 1.5 * 0.2)
    assert ours == ["noise", 2, pytest.approx(0.15), None, pytest.approx(0.25), None] and other[1] == 0
    assert rival[4] == pytest.approx(0.355) and rival[5].startswith("+0.105 [") and rival[3].startswith("-0.050 [")


def test_bars_say_what_holds(found):
    held = {what: holds for what, _, _, holds in bars(found)}
    assert held["noise at 1.5 times: retain"] is False and held["noise at 1.5 times: third"] is False
    assert held["the model before: accuracy"] and held["change of retain error by further training"]
    assert not bars({"black hole": {"0": {"after": side(1, 1, 1)}}})


def test_means_of_seeds_stand_in_the_table(found):
    text = table(found)
    assert "| max-loss, alpha 0.05 | 2 | 0.450 / 0.900 | 0.100 / 0.900 | 0.505 / 0.900 | – | – |" in text
    assert "| original | 1 | 0.200 / 0.900 |" in text and "**no**" in text
    del found["retain-only"]["0"]["after"]["retain"], found["retain-only"]["1"]["after"]["retain"]
    assert "| retain-only | 2 | 0.250 / 0.900 | – | 0.305 / 0.900 |" in table(found)
    assert table({}) == ""


@pytest.mark.slow
def test_rows_run_once_and_share_what_they_can(tmp_path, monkeypatch):
    row, plain = "nothing alone, steps 10", ["noise, alpha 0.02", "max-loss, alpha 0.02"]
    for name in (FISHER_OF, row, *plain):
        few = {"num_train_steps": 1, "fisher_samples": 8} | ({} if name in plain else {"images_class": 3})
        monkeypatch.setitem(ROWS, name, ROWS[name] | few)
    found = run_study(I2IConfig(output_dir=str(tmp_path), only="alpha 0.02", eval_images_class=3))
    assert set(found) == {*plain} and found[plain[0]]["0"]["before"] == found[plain[1]]["0"]["before"]
    reused = [json.loads(path.read_text())["seconds"]["reused"] for path in sorted(tmp_path.glob("*/0/metrics.json"))]
    assert reused == [[], ["before"]] or reused == [["before"], []]
    config = I2IConfig(output_dir=str(tmp_path), only=row, eval_images_class=3)
    found = run_study(config)
    assert json.loads((tmp_path / "study.json").read_text()) == found
    assert set(found) == {FISHER_OF, row, *plain} and found[row]["0"]["after"]["retain"]["num_images"] == 12
    assert "third" not in found[row]["0"]["after"] and f"| {row} | 1 |" in (tmp_path / "study.md").read_text()
    found[row]["0"]["seconds"] = -1
    (tmp_path / "study.json").write_text(json.dumps(found))
    assert run_study(config)[row]["0"]["seconds"] == -1
    with pytest.raises(ValueError, match="was made with .*'eval_images_class': 3"):
        run_study(I2IConfig(output_dir=str(tmp_path), only=row, eval_images_class=4))
