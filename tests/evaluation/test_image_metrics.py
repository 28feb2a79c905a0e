"""FID, KID, Inception Score, precision and recall against formulas and oracles; the networks they are taken by."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from sa_diffusers.evaluation.images.extractors import (
    ClassifierExtractor,
    InceptionExtractor,
    TransformersExtractor,
    load_extractor,
)
from sa_diffusers.evaluation.images.metrics import (
    FeatureSet,
    MetricSettings,
    check_counts,
    check_metrics,
    compute_features,
    frechet_distance,
    image_metrics,
    inception_score,
    kernel_inception_distance,
    manifold_metrics,
    precision_and_recall,
)
from sa_diffusers.evaluation.images.sets import RandomSubset
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judges.resnet_classifier import ResNetClassifier
from sa_diffusers.io.hub import ModelLoadError


DIGITS = {"digit": [str(index) for index in range(3)]}
COLOURED = {"digit": ["one", "two"], "ink": ["red", "green", "blue"]}


class Images:
    """Images in memory."""

    name = "random"

    def __init__(self, count: int = 11, size: int = 16):
        self.data = torch.rand(count, 3, size, size) * 2 - 1
        self.image_size = (size, size)

    def __len__(self) -> int:
        return len(self.data)

    def images(self, indices):
        return self.data[list(indices)]


class NamedInception(InceptionExtractor):
    """What decides the names of the metrics; its network is not needed for that."""

    def __init__(self):
        nn.Module.__init__(self)


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def mean_kernel(a: list[list[float]], b: list[list[float]], skip_diagonal: bool) -> float:
    """Mean of (x y / D + 1)^3 over pairs, one by one."""
    values = [
        (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3
        for i, x in enumerate(a)
        for j, y in enumerate(b)
        if not (skip_diagonal and i == j)
    ]
    return sum(values) / len(values)


def squared_mmd(real: torch.Tensor, generated: torch.Tensor) -> float:
    """The unbiased estimate of Binkowski et al. (2018)."""
    x, y = real.double().tolist(), generated.double().tolist()
    return mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)


def by_eigenvalues(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Heusel et al. 2017, Eq. 6, in float64: C C' has the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric."""
    real, generated = real.double(), generated.double()
    covariances = [torch.atleast_2d(features.T.cov()) for features in (real, generated)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ covariances[1] @ root)
    trace = sum(covariance.trace() for covariance in covariances) - 2 * product.clamp(min=0).sqrt().sum()
    return ((real.mean(0) - generated.mean(0)).square().sum() + trace).item()


@pytest.mark.parametrize("width", [1, 6])
def test_fid_is_the_distance_of_the_two_gaussians(width):
    real, generated = torch.randn(300, width), torch.randn(200, width) * 1.7 + 0.3
    found = frechet_distance(real=real, generated=generated)
    assert_close(found, by_eigenvalues(real, generated), rtol=1e-9, atol=0)
    assert_close(found, frechet_distance(real=generated, generated=real), rtol=1e-9, atol=0)
    assert_close(frechet_distance(real=real, generated=real + 3), 9.0 * width, rtol=1e-6, atol=0)


def test_fid_of_fewer_images_than_features():
    real, generated = torch.randn(8, 20), torch.randn(9, 20) + 1
    expected = by_eigenvalues(real, generated)
    assert_close(frechet_distance(real=real, generated=generated), expected, rtol=1e-5, atol=0)


def test_identical_and_disjoint_sets():
    features = torch.randn(60, 5)
    one = FeatureSet("one", features)
    metrics = {"metrics": ["fid", "prc"], "extractor": nn.Flatten()}
    same = image_metrics(real=one, generated=FeatureSet("copy", features.clone()), **metrics)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert (same["prc"]["precision"], same["prc"]["recall"], same["prc"]["coverage"]) == (1, 1, 1)
    far = image_metrics(real=one, generated=FeatureSet("far", features + 1000), **metrics)
    assert [far["prc"][name] for name in ("precision", "recall", "density", "coverage")] == [0] * 4
    assert far["frechet_distance"] == pytest.approx(5e6, rel=1e-6)


def test_kid_of_whole_sets_is_the_squared_mmd():
    real, generated = torch.randn(14, 4), torch.randn(14, 4) + 0.5
    found = kernel_inception_distance(real=real, generated=generated, settings=MetricSettings(num_subsets=3))
    assert_close(found["mean"], squared_mmd(real, generated), rtol=1e-10, atol=0)
    assert found["std"] is None  # every subset is the whole set: 0 would be no error
    assert (found["num_subsets"], found["subset_size"]) == (3, 14)


@pytest.mark.parametrize(
    ("counts", "size", "known"),
    [((14, 14), 14, False), ((14, 14), 13, True), ((14, 20), 99, True), ((20, 14), 14, True)],
)
def test_the_spread_of_the_kid_is_known_where_its_subsets_differ(counts, size, known):
    real, generated = (torch.randn(count, 4) for count in counts)
    settings = MetricSettings(num_subsets=9, subset_size=size)
    found = kernel_inception_distance(real=real, generated=generated, settings=settings)
    assert found["std"] > 1e-3 if known else found["std"] is None


def test_kid_of_subsets_depends_on_its_own_seed_only():
    real, generated = torch.randn(40, 4), torch.randn(30, 4) + 0.5

    def measure(seed: int) -> dict:
        settings = MetricSettings(num_subsets=200, subset_size=10, seed=seed)
        return kernel_inception_distance(real=real, generated=generated, settings=settings)

    before = torch.get_rng_state()
    first = measure(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert measure(0) == first != measure(1)
    assert (first["num_subsets"], first["subset_size"]) == (200, 10)
    # The estimate is unbiased: the mean over subsets comes to the value of the whole sets.
    expected, error = squared_mmd(real, generated), first["std"] / math.sqrt(200)
    assert abs(first["mean"] - expected) < 4 * error < 0.5 * abs(expected)


def test_inception_score_is_its_formula():
    probabilities = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.25, 0.5, 0.25]]
    marginal = [sum(row[k] for row in probabilities) / 4 for k in range(3)]
    divergences = [sum(p * math.log(p / m) for p, m in zip(row, marginal, strict=True)) for row in probabilities]
    found = inception_score(logits_of(probabilities), MetricSettings(num_splits=1))
    assert_close(found["mean"], math.exp(sum(divergences) / 4), rtol=1e-6, atol=0)
    assert (found["std"], found["num_splits"]) == (None, 1)


def test_inception_score_of_known_cases():
    sure = torch.eye(4).repeat(5, 1) * 200
    assert inception_score(sure, MetricSettings(num_splits=1))["mean"] == pytest.approx(4)
    assert inception_score(sure, MetricSettings(num_splits=20))["mean"] == pytest.approx(1)  # an image is its marginal
    assert inception_score(torch.zeros(21, 4), MetricSettings()) == {
        "mean": pytest.approx(1), "std": pytest.approx(0, abs=1e-6), "num_splits": 7,
    }  # fmt: skip


def test_swapping_the_sets_swaps_precision_and_recall():
    wide, narrow = FeatureSet("wide", torch.randn(50, 3)), FeatureSet("narrow", torch.randn(50, 3) * 0.5)
    options = {"metrics": ["prc"], "extractor": nn.Flatten(), "settings": MetricSettings(num_neighbours=5)}
    forward = image_metrics(real=wide, generated=narrow, **options)["prc"]
    backward = image_metrics(real=narrow, generated=wide, **options)["prc"]
    assert (forward["real"], forward["generated"]) == ("wide", "narrow")
    assert forward["precision"] > forward["recall"]
    assert (forward["precision"], forward["recall"]) == (backward["recall"], backward["precision"])
    expected = manifold_metrics(real=wide.features, generated=narrow.features, k=5)
    assert {name: forward[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("largest", "expected"), [(10_000, 40), (25, 25)])
def test_both_sets_are_cut_to_one_size(largest, expected):
    real, generated = torch.randn(90, 3), torch.randn(40, 3)
    settings = MetricSettings(max_prc_images=largest, num_neighbours=1)
    found = precision_and_recall(real=real, generated=generated, settings=settings)
    assert (found["num_images"], found["num_neighbours"]) == (expected, 1)
    for name in ("precision", "recall"):  # a multiple of 1 / images
        assert found[name] * expected == pytest.approx(round(found[name] * expected))


def test_names_say_whether_the_features_are_inception_s():
    sets = {name: FeatureSet(name, torch.randn(20, 4), torch.randn(20, 3)) for name in ("real", "generated")}
    metrics = ["fid", "kid", "is", "prc"]
    ours = ClassifierExtractor(DigitClassifier(DIGITS))
    theirs = image_metrics(**sets, metrics=metrics, extractor=NamedInception())
    other = image_metrics(**sets, metrics=metrics, extractor=ours)
    assert list(theirs) == ["fid", "kid", "inception_score", "prc"]
    assert list(other) == ["frechet_distance", "kernel_distance", "classifier_score", "prc"]
    assert list(theirs.values()) == list(other.values())
    for kind in ("generated", "real"):
        assert other["classifier_score"][kind] == inception_score(sets[kind].logits, MetricSettings())


@pytest.mark.parametrize(
    "extractor", [nn.Flatten(), ClassifierExtractor(AttributeClassifier(COLOURED))], ids=["module", "two attributes"]
)
def test_the_inception_score_needs_logits(extractor):
    with pytest.raises(ValueError, match="needs class logits"):
        check_metrics(["is"], extractor)
    check_metrics(["fid", "kid", "prc"], extractor)


@pytest.mark.parametrize(
    ("metric", "counts", "message"),
    [("fid", (1, 9), "needs 2"), ("is", (99, 9), "needs 10"), ("prc", (99, 3), "needs 4"), ("kid", (9, 1), "needs 2")],
)
def test_too_few_images_are_refused(metric, counts, message):
    with pytest.raises(ValueError, match=f"'{metric}' {message} images of each set"):
        check_counts([metric], counts, MetricSettings())
    check_counts([metric], (10, 10), MetricSettings())


def test_wrong_metrics_and_settings_are_refused():
    with pytest.raises(ValueError, match="expected metrics of fid, kid, is, prc, got 'fdi'"):
        check_metrics(["fdi"], nn.Flatten())
    with pytest.raises(ValueError, match="num_splits >= 1, got 0"):
        MetricSettings(num_splits=0)
    with pytest.raises(ValueError, match="subset_size >= 2, got 1"):
        MetricSettings(subset_size=1)
    with pytest.raises(ValueError, match="one width, got 4 and 5"):
        sets = {"real": FeatureSet("a", torch.randn(9, 4)), "generated": FeatureSet("b", torch.randn(9, 5))}
        image_metrics(**sets, metrics=["fid"], extractor=nn.Flatten())


def test_features_do_not_depend_on_the_batch_size_nor_on_training_mode():
    extractor = ClassifierExtractor(DigitClassifier(DIGITS, image_size=16, kernel_size=3, padding=1)).train()
    images = Images()
    whole = compute_features(extractor, images, batch_size=20)
    parts = compute_features(extractor, images, batch_size=3)
    assert extractor.training and extractor.classifier.training
    assert_close(parts.features, whole.features)
    with torch.no_grad():
        assert_close(whole.logits, extractor.classifier.eval()(images.data)["digit"])
    assert (whole.features.shape, whole.logits.shape, whole.name) == ((11, 50), (11, 3), "random")


def test_any_module_is_an_extractor():
    images = Images(5, size=4)
    found = compute_features(nn.Flatten(), RandomSubset(images, 5, seed=0), batch_size=2)
    assert_close(found.features, images.data.flatten(1), rtol=0, atol=0)
    assert found.logits is None
    with pytest.raises(ValueError, match=r"expected features \[5, D\], got \[5, 3, 4, 4\]"):
        compute_features(nn.Identity(), images)
    with pytest.raises(ValueError, match="expected finite features of random"):
        images.data[3] = math.nan
        compute_features(nn.Flatten(), images)


@pytest.mark.parametrize(
    "classifier",
    [
        DigitClassifier(DIGITS, image_size=16, kernel_size=3, padding=1),
        AttributeClassifier(COLOURED, image_size=16, channels=(8, 8)),
        ResNetClassifier(DIGITS, image_size=16, depths=(1, 1), hidden_sizes=(8, 12), embedding_size=8, stem="small"),
    ],
    ids=lambda classifier: type(classifier).__name__,
)
def test_a_classifier_from_its_folder(tmp_path, classifier):
    classifier.eval().save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path), attribute="digit")
    images = Images().data
    with torch.no_grad():
        features, logits = extractor.features_and_logits(images)
        assert_close(features, classifier.features(images))
        assert_close(logits, classifier(images)["digit"])
        assert_close(extractor(images), features)
        grey = torch.full((2, 3, 40, 24), 0.25)  # of another size; scaling leaves one colour as it is
        assert_close(extractor(grey), classifier.features(grey[:, :, :16, :16]))
    with pytest.raises(ValueError, match="expected an attribute of the classifier .*, got 'colour'"):
        load_extractor(str(tmp_path), attribute="colour")


def test_a_transformers_model_from_its_folder(tmp_path):
    """Its pooled output, of images that its own processor has prepared, in eval mode."""
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"))
    model.train()(torch.randn(8, 3, 16, 16))  # running statistics that tell eval mode from training mode
    model.save_pretrained(tmp_path)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    ViTImageProcessorPil(size=16, image_mean=mean, image_std=std).save_pretrained(tmp_path)
    images = Images()
    found = compute_features(load_extractor(str(tmp_path)), images, batch_size=4)

    pixels = ((images.data + 1) * 127.5).round() / 255
    channels = [(pixels[:, c] - mean[c]) / std[c] for c in range(3)]
    with torch.no_grad():
        expected = model.eval()(torch.stack(channels, 1)).pooler_output[:, :, 0, 0]
    assert found.features.shape == (11, 12)
    assert_close(found.features, expected)
    with pytest.raises(ValueError, match="expected a classifier to read the attribute"):
        load_extractor(str(tmp_path), attribute="digit")

    weights = load_file(tmp_path / "model.safetensors")
    del weights["embedder.embedder.convolution.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="got none for embedder.embedder.convolution.weight"):
        load_extractor(str(tmp_path))


def test_a_checkpoint_without_pooler_gives_its_first_token(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size=16).save_pretrained(tmp_path)
    images = Images().data
    with torch.no_grad():
        found = load_extractor(str(tmp_path))(images)
        pixels = ((images + 1) * 127.5).round() / 127.5 - 1
        assert_close(found, model.vit(pixels).last_hidden_state[:, 0])


def test_a_model_of_text_is_refused():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(ValueError, match="expected a vision model, got BertModel, which takes input_ids"):
        TransformersExtractor(BertModel(BertConfig(**sizes, vocab_size=9)), ViTImageProcessorPil())


def test_without_the_extra_inception_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not there
    with pytest.raises(ModelLoadError, match=r'pip install "sa_diffusers\[fid\]"'):
        load_extractor("inception")


def test_nothing_to_load(tmp_path):
    with pytest.raises(ModelLoadError, match="neither a local folder nor a model on the hub"):
        load_extractor(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="expected a classifier .*, got UNet2DModel"):
        load_extractor(str(tmp_path))
