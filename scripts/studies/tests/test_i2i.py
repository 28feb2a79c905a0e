"""The study of models that complete pictures: a row runs, its model is measured, and both stand in the tables."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sa_diffusers import methods
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.data.picture_groups import PictureGroup, read_group
from sa_diffusers.evaluation.completion import completed, masked_errors, measured
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import get_family
from sa_diffusers.families.architectures import build_masked_autoencoder
from sa_diffusers.families.completion.networks import build_codebook, build_pixel_inpaint, build_token_inpaint
from sa_diffusers.runs.base.pixels import PixelInpaintConfig
from studies.i2i import probes, references
from studies.i2i import table as runs
from studies.i2i.bars import bars
from studies.i2i.equal import at_forgetting, better, compared, equal_table
from studies.i2i.figures import save_figures
from studies.i2i.rows import FISHER_OF, LINES, PROBED, ROWS, SELECTIVE, WIDER, rows_of
from studies.i2i.sections import probes_table, table
from studies.i2i.smile import estimate, smile
from studies.i2i.table import I2IConfig, Study, run_study


def tiny(seed: int):
    """8 x 8 patches of one pixel, as the masks of the curves need."""
    options = SimpleNamespace(
        image_size=8, patch_size=1, hidden_size=16, num_layers=1, num_heads=2, decoder_hidden_size=8,
        decoder_num_layers=1, initializer_range=0.2,
    )  # fmt: skip
    pipeline = build_masked_autoencoder(options, 1, seed)
    pipeline.mae.eval()
    return get_family(pipeline)


def tiny_pipeline(kind: str, size: int, seed: int = 0):
    """A model of tokens or of pixels, with random weights, whose holes are of 8 x 8 patches at least."""
    if kind == "pixel_inpaint":
        options = {"image_size": size, "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2}
        pipeline = build_pixel_inpaint(PixelInpaintConfig(**options, num_train_timesteps=20), 1, seed)
        pipeline.unet.eval()
        return pipeline
    options = SimpleNamespace(
        image_size=size, vq_channels=[4, 8, 8] if size == 32 else [4], num_codes=16, code_size=4, hidden_size=16,
        num_heads=2, num_layers=1, decoder_num_layers=1, choice_temperature=4.5,
    )  # fmt: skip
    pipeline = build_token_inpaint(options, build_codebook(options, 1, seed).eval(), seed)
    pipeline.transformer.eval()
    return pipeline


@pytest.fixture
def cheap(monkeypatch):
    """Measures of few pictures and steps."""
    for name, value in {"PER_CURVE": 2, "FITTED": 12, "RELEARN_STEPS": 2, "GIVEN": 2, "SEARCH_STEPS": 2}.items():
        monkeypatch.setattr(probes, name, value)
    monkeypatch.setattr(probes, "CURVES", ("quarter", "left 25"))


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
    wider, selective = ({name for rows in part.values() for name in rows} for part in (WIDER, SELECTIVE))
    assert rows_of("masked_autoencoder").keys() == ROWS.keys() - wider - selective
    assert rows_of("token_inpaint").keys() == ROWS.keys() - selective and rows_of("pixel_inpaint") == ROWS


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
    expected, _ = measured(truth, filled, hole, bench.groups["forget"], bench.judge.classifier)
    assert probes.second_generation(bench, (truth, truth)) == pytest.approx(expected)


def test_membership_is_the_share_of_pairs_in_order(bench):
    train, test = (bench.fills(bench.base, side) for side in (True, False))
    errors = [masked_errors(*pair, bench.hole) for pair in (train, test)]
    right = (errors[0][:, None] < errors[1][None]).double().mean().item()
    assert probes.membership(bench, train, test) == pytest.approx(right)


def test_pictures_that_differ_by_themselves_are_told_by_the_controls(bench):
    digits = bench.groups["retain"].test.images[:20]
    noise = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = [LabelledImages(images, torch.zeros(20, dtype=torch.long), ["2"]) for images in (digits, noise)]
    before = {name: weight.clone() for name, weight in bench.base.module.state_dict().items()}
    for one, other in ((0, 1), (1, 0)):
        groups = bench.groups | {"forget": PictureGroup("2", data[one], data[other])}
        found = references.membership_controls(probes.Bench(groups, bench.judge, bench.base, None), 0)
        assert abs(found["visible_pixels"] - other) < 0.1 and 0 <= found["random_encoder"] <= 1
    torch.testing.assert_close(dict(bench.base.module.state_dict()), before)


@pytest.mark.parametrize("kind", ["token_inpaint", pytest.param("pixel_inpaint", marks=pytest.mark.slow)])
def test_other_families_are_measured_by_all_but_the_search(bench, cheap, kind):
    families = [get_family(tiny_pipeline(kind, 8, seed)) for seed in (0, 1)]
    own = probes.Bench(bench.groups, bench.judge, *families)
    found = probes.probe(own, families[0], 0, {})
    assert found.keys() == probes.MEASURES.keys() - {"latent_search"} and not probes.unmeasured(families[0], found)
    assert {group for part in found["curves"].values() for group in part} == {"forget", "retain", "third"}
    assert references.references(own, 0, {}).keys() == {"smile", "membership_of"}
    assert 0 <= probes.conspicuousness(own, families[0], 0) <= 1


def test_what_is_known_stays_and_what_is_missing_is_added(bench, cheap):
    told = {"masked_mse": -1.0, "accuracy": -1.0}
    old = {name: name for name in probes.MEASURES} | {"curves": {"left 25": {"forget": told}}}
    assert probes.unmeasured(bench.base, old) == ["curves"]
    found = probes.probe(bench, bench.base, 0, old)
    assert found | {"curves": None} == old | {"curves": None} and not probes.unmeasured(bench.base, found)
    assert found["curves"]["left 25"].pop("forget") == told
    assert found["curves"]["left 25"].keys() == {"retain", "third"} and found["curves"]["quarter"].keys() > {"forget"}
    known = {"smile": 1, "random_encoder": 2, "visible_pixels": 3}
    assert references.references(bench, 0, known).items() > known.items()


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
    found = {"original": {"0": {"probes": {"curves": probes.curves(bench, bench.base, {})}}}}
    save_figures(bench, found, {"original": bench.base}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fills.png", "curves.png", "tsne.png"}
    forget = found["original"]["0"]["probes"]["curves"]["left 25"]["forget"]
    truth, filled, hole = completed(bench.base, bench.groups["forget"], "left 25", 0)
    assert forget["masked_mse"] == pytest.approx(masked_errors(truth, filled, hole).mean().item())


def side(forget: float, retain: float, third: float, accuracy: float = 0.9) -> dict:
    errors = zip(("forget", "retain", "third"), (forget, retain, third), strict=True)
    return {name: {"masked_mse": error, "accuracy": accuracy, "num_images": 10} for name, error in errors}


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
    assert held["noise at 1.5 times: retain accuracy"]
    for seed in ("0", "1"):
        found["noise, alpha 0.25"][seed]["after"]["retain"]["accuracy"] = 0.84  # 0.87 half the way there
    accuracy = next(row for row in bars(found) if row[0].endswith("accuracy") and "times" in row[0])
    assert accuracy[1:] == (">= 0.88", "0.870", False)


def test_cells_where_a_rival_keeps_more_are_counted(found):
    name = "where a rival keeps more at 1.5 times"
    assert better(found, lambda before: 0.3) == ["max-loss, retain"]  # its third is worse
    assert (f"{name} (max-loss, retain)", "<= 1", "1", True) in bars(found)
    found["retain-only, l1"] = found["max-loss, alpha 0.05"]  # as good, and sparse
    assert (f"{name} (max-loss, retain; sparse (l1), retain)", "<= 1", "2", False) in bars(found)
    assert "| sparse (l1) | 2 | 0.100 |" in equal_table(found)
    one = {row: {"0": seeds["0"]} for row, seeds in found.items()}
    assert better(one, lambda before: 0.3) is None  # no interval, nothing to say


def test_another_family_has_its_own_forgetting_and_bars(found):
    for seeds in found.values():
        for entry in seeds.values():
            entry["family"] = "token_inpaint"
    held = {what: value for what, _, value, _ in bars(found)}
    assert held["noise at 1.25 times: retain"] == "1.250" and "the model before: accuracy" not in held
    text = table(found)
    assert "| asked of the model of tokens |" in text and "model of tokens: error of forgotten pictures 1.25" in text


def test_what_is_tried_of_a_diffusion_stands_at_equal_forgetting(found):
    found["low timesteps, alpha 1"] = found["noise, alpha 0.25"]
    for seeds in found.values():
        for entry in seeds.values():
            entry["family"] = "pixel_inpaint"
    assert "| low timesteps | 2 | 0.120 |" in equal_table(found)


def test_what_is_tried_of_a_diffusion_is_asked_of_it(tmp_path, monkeypatch):
    pipeline, asked = tiny_pipeline("pixel_inpaint", 32), {}
    pipeline.save_pretrained(tmp_path / "pixels")
    study = Study(I2IConfig(output_dir=str(tmp_path / "study"), model=str(tmp_path / "pixels")))
    (tmp_path / "study" / "before_0.safetensors").touch()

    def run(config):
        methods.get(config.method)._check_features(SimpleNamespace(options=config, family=get_family(pipeline)))
        asked[Path(config.output_dir).parent.name] = config
        return SimpleNamespace(metrics={"before": {}, "after": {}, "seconds": {"train": 0.0}})

    monkeypatch.setattr(runs, "run_forgetting", run)
    for name in (name for rows in SELECTIVE.values() for name in rows):
        study.run_row(name, 0)
    assert len(asked) == 12 and asked["low_timesteps,_alpha_4"].timestep_range == [0.0, 0.3]
    assert asked["deepest_features,_alpha_1"].feature_depths == [-1]
    released = asked["released_target,_alpha_0.25"]
    assert (released.surrogate_context, released.noise, released.forget_alpha) == ("real", "normal", 0.25)
    assert asked["retain_weight_10,_alpha_16"].retain_weight == 10


def test_a_ratio_is_of_the_same_seeds(found):
    def told(value: float) -> dict:
        return {"after": side(0.4, 0.2, 0.3), "probes": {"smile": {"tau 1": value, "tau 5": value}}}

    found["noise, alpha 0.25"] = {seed: told(value) for seed, value in zip("012", (1.0, 2.0, 3.0), strict=True)}
    found["original"] = {seed: told(4.0) for seed in "02"}
    assert ("SMILE after / before, tau 1: noise, alpha 0.25", "<= 0.75", "0.500", True) in bars(found)


def test_measures_are_means_over_seeds_and_columns_without_any_are_left_out(found):
    found["original"] = {
        seed: {"after": side(0.4, 0.2, 0.3), "probes": {"membership": value}}
        for seed, value in (("0", 0.5), ("1", 0.6))
    }
    controls = {"membership_of": {"visible_pixels": 0.52}}
    found["noise hole"] = {"0": {"after": {}, "probes": {"smile": {"tau 1": 0, "tau 5": 0}} | controls}}
    lines = probes_table(found).splitlines()
    assert lines[0].startswith("| masked autoencoder: pictures to forget | SMILE, tau 1 / 5 | membership (AUC) |")
    assert "| original | – | 0.55 |" in lines and "| control: visible pixels | – | 0.52 |" in lines
    for seed, value in (("0", 0.5), ("1", 0.7)):
        likeness = {"psnr": 10 * value, "feature_cosine": value, "classifier_score": 9.0}
        found["original"][seed]["after"]["forget"] |= likeness
    assert "| original | 6.0 / 0.600 | – | – | 9.00 | – | – |" in probes_table(found)


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


def test_a_folder_of_the_bundled_model_says_what_it_always_said(tmp_path):
    Study(I2IConfig(output_dir=str(tmp_path)))
    assert json.loads((tmp_path / "settings.json").read_text()).keys() == {
        "pictures", "num_train_steps", "eval_images_class",
    }  # fmt: skip
    tiny_pipeline("pixel_inpaint", 32).save_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match="was made with"):
        Study(I2IConfig(output_dir=str(tmp_path), model=str(tmp_path / "pixels")))
    with pytest.raises(ValueError, match="expected a model of one of masked_autoencoder, token_inpaint"):
        Study(I2IConfig(output_dir=str(tmp_path), model="bundled/digits/pipeline"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token_inpaint", "pixel_inpaint"])
def test_another_family_runs_by_the_same_command(tmp_path, monkeypatch, cheap, kind):
    for seed in (0, 1):
        tiny_pipeline(kind, 32, seed).save_pretrained(tmp_path / str(seed))
    rows = {name: ROWS[name] for name in ("noise, alpha 0.25", FISHER_OF)}
    rows[FISHER_OF] = rows[FISHER_OF] | {"num_train_steps": 1, "fisher_samples": 8, "images_class": 3}
    for name, changes in rows.items():
        monkeypatch.setitem(ROWS, name, changes)
    monkeypatch.setattr(runs, "rows_of", lambda kind: rows)
    config = I2IConfig(
        model=str(tmp_path / "0"), retrained=str(tmp_path / "1"), output_dir=str(tmp_path / "study"), seeds=[0, 1],
        num_train_steps=1, eval_images_class=3,  # 30 points or more of t-SNE
    )  # fmt: skip
    found = run_study(config)
    holes = {"original", "retrained", "black hole", "noise hole"}
    assert found.keys() == holes | {"noise, alpha 0.25", FISHER_OF}
    assert {seed for runs_of in found.values() for seed in runs_of} == {"0", "1"}  # references, too
    assert all(len(runs_of) == 2 for runs_of in found.values())
    assert {run["family"] for runs_of in found.values() for run in runs_of.values()} == {kind}
    assert all("psnr" in run["after"]["retain"] for runs_of in found.values() for run in runs_of.values())
    assert {path.name for path in (tmp_path / "study").glob("*.png")} == {"fills.png", "curves.png", "tsne.png"}
    text = (tmp_path / "study" / "study.md").read_text()
    assert "latent search" not in text and "told from retrained" in text and "control: visible pixels" in text
    # What older runs lack is added, and what they say stays.
    old = found["noise, alpha 0.25"]["0"]
    old["after"]["forget"] = {"masked_mse": -1.0, "accuracy": None, "num_images": 6}
    del old["probes"]["curves"]["quarter"], found["noise hole"]["0"]["probes"]["membership_of"]
    (tmp_path / "study" / "study.json").write_text(json.dumps(found))
    again = run_study(config)["noise, alpha 0.25"]["0"]
    assert again["after"]["forget"]["masked_mse"] == -1.0 and again["after"]["forget"]["psnr"] > 0
    assert again["probes"]["curves"].keys() == {"quarter", "left 25"}
    assert "membership_of" in json.loads((tmp_path / "study" / "study.json").read_text())["noise hole"]["0"]["probes"]
