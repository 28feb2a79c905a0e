"""The Fisher: fast paths against a loop over samples and timesteps, the cheap one against what is known exactly."""

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sa_diffusers.core.fisher import Fisher, FisherMismatch, FisherSums, estimate_fisher, merge, stratified_terms
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.seeding import seeded


T = 7
INDICES = range(4)
METADATA = {"model_hash": "ab12", "reduction": "mean", "num_terms": T}


class Denoiser(nn.Module):
    """Convolution, group norm and a timestep bias: gradients differ between samples and timesteps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.time = nn.Embedding(T, 4)
        self.last = nn.Conv2d(4, 2, 1)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, noisy, timesteps):
        hidden = self.norm(self.first(noisy)) + self.time(timesteps)[:, :, None, None]
        return SimpleNamespace(sample=self.last(torch.tanh(hidden)))


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(1)
    return Denoiser().double().eval()


@pytest.fixture
def loss() -> DiffusionLoss:
    return DiffusionLoss(torch.linspace(0.99, 0.05, T, dtype=torch.float64))


def sample(index: int) -> dict:
    return {"sample": torch.randn(1, 2, 4, 4, generator=seeded("sample", index), dtype=torch.float64)}


def run(model, loss, indices=INDICES, terms=None, **options) -> FisherSums:
    return estimate_fisher(model, loss, dict(model.named_parameters()), sample, indices, terms=terms, **options)


def gradient(model, value) -> dict:
    names, parameters = zip(*model.named_parameters(), strict=True)
    parts = torch.autograd.grad(value, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, parts, strict=True)}


def oracle(model, loss, terms=None, seed=0) -> dict[str, torch.Tensor]:
    """Eq. 5 one sample and one timestep at a time: sum the gradients over timesteps, then square, then average."""
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index in INDICES:
        for draw in range(1 if terms is None else 2):
            generator = seeded(seed, "fisher", index, draw)
            chosen, weights = stratified_terms(T, terms or T, generator)
            noise = torch.randn(len(chosen), 2, 4, 4, generator=generator, dtype=torch.float64)
            summed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            for term, weight, eps in zip(chosen, weights, noise, strict=True):
                for name, g in gradient(model, loss(model, sample(index), term[None], eps[None])[0]).items():
                    summed[name] += weight * g
            for name, g in summed.items():
                mean[name] += g.square() / len(INDICES) / (1 if terms is None else 2)
    return mean


def assert_equal(first: dict, second: dict, rtol=0.0, atol=0.0) -> None:
    torch.testing.assert_close(first, second, rtol=rtol, atol=atol, check_dtype=False)


def test_all_timesteps_equal_the_one_by_one_oracle(model, loss):
    fisher = run(model, loss, chunk_size=3).finish(METADATA)
    expected = oracle(model, loss)
    assert_equal(fisher.tensors, expected, rtol=1e-5, atol=1e-6 * max(e.max().item() for e in expected.values()))
    assert fisher.metadata == METADATA | {"num_samples": 4, "scale": 1.0, "num_noisy_tensors": 0} | {
        "total_relative_error": fisher.metadata["total_relative_error"]
    }
    assert fisher.tensors["unused"].eq(0).all()


def test_the_cheap_estimator_equals_its_oracle_times_the_scale(model, loss):
    sums = run(model, loss, terms=3, seed=5)
    fisher = sums.finish(METADATA)
    expected = oracle(model, loss, terms=3, seed=5)
    overall = sum(u for _, u in sums.totals.values()) / sum(s for s, _ in sums.totals.values())
    assert fisher.metadata["scale"] == pytest.approx(overall)
    for name, (square, unbiased) in sums.totals.items():
        assert square == pytest.approx(expected[name].sum().item() * len(INDICES), rel=1e-5, abs=1e-9)
        expected[name] *= min(1.0, max(3 / T, unbiased / square)) if square > 0 else 1.0
    assert_equal(fisher.tensors, expected, rtol=1e-5, atol=1e-6 * max(e.max().item() for e in expected.values()))


def test_one_draw_of_every_timestep_needs_no_scale(model, loss):
    """With K = T nothing is left out, so U is the mean of the two squares and c must be 1."""
    assert run(model, loss, terms=T).finish(METADATA).metadata["scale"] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("terms", [None, 5])
@pytest.mark.parametrize("chunk_size", [1, 2, T, 50])
def test_the_chunk_changes_nothing(model, loss, terms, chunk_size):
    whole, chunked = run(model, loss, terms=terms, chunk_size=T), run(model, loss, terms=terms, chunk_size=chunk_size)
    assert_equal(chunked.square, whole.square, rtol=1e-6, atol=1e-12)
    assert_equal(chunked.totals, whole.totals, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("terms", [None, 3])
def test_shards_add_up(model, loss, terms):
    whole = run(model, loss, terms=terms).finish(METADATA)
    merged = merge([run(model, loss, [1, 3], terms), run(model, loss, [0, 2], terms)]).finish(METADATA)
    assert_equal(merged.tensors, whole.tensors, rtol=1e-6, atol=1e-12)
    assert merged.metadata["scale"] == pytest.approx(whole.metadata["scale"], rel=1e-12)


def test_merge_leaves_its_parts_alone_and_refuses_a_sample_twice(model, loss):
    first, second = run(model, loss, [0, 1]), run(model, loss, [2])
    before = {name: value.clone() for name, value in first.square.items()}
    merge([first, second])
    assert_equal(first.square, before)
    assert list(first.unbiased) == [0, 1]
    kept = []

    def one_at_a_time():
        for index in range(4):
            assert sum(made() is not None for made in kept) <= 1  # the one before may not be gone yet
            part = run(model, loss, [index])
            kept.append(weakref.ref(part))
            yield part
            del part

    assert_equal(merge(one_at_a_time()).square, merge([run(model, loss, [index]) for index in range(4)]).square)
    with pytest.raises(ValueError, match="sample 1 is in two"):
        merge([first, run(model, loss, [1, 2])])


@pytest.mark.parametrize("terms", [None, 3])
def test_continuing_equals_one_go(model, loss, terms):
    whole = run(model, loss, terms=terms)
    half = run(model, loss, [0, 1], terms)
    continued = run(model, loss, [2, 3], terms, sums=half)
    assert_equal(continued.square, whole.square)
    assert continued.totals == whole.totals


def test_the_seed_decides(model, loss):
    assert_equal(run(model, loss, terms=3, seed=1).square, run(model, loss, terms=3, seed=1).square)
    assert run(model, loss, terms=3, seed=1).totals != run(model, loss, terms=3, seed=2).totals


class KnownGradients:
    """A linear model with Gaussian noise: the gradient of term t is N(means[t], deviations[t]^2) in each weight.

    Each weight is one independent repetition, so one sample already gives the average of many.
    """

    reduction = "sum"

    def __init__(self, means, deviations, repetitions):
        self.means, self.deviations, self.num_terms, self.repetitions = means, deviations, len(means), repetitions

    def sample_noise(self, batch, generator):
        return torch.randn(len(batch["sample"]), self.repetitions, generator=generator, dtype=torch.float64)

    def __call__(self, model, batch, terms, noise):
        return ((self.means[terms, None] + self.deviations[terms, None] * noise) * model.weight).sum(1)


REPETITIONS = 300
SAMPLES = 600


def known_sums(means, deviations, terms, repetitions=REPETITIONS, indices=range(SAMPLES), name="weight") -> FisherSums:
    weight = nn.Parameter(torch.zeros(repetitions, dtype=torch.float64))
    model, loss = SimpleNamespace(weight=weight), KnownGradients(means, deviations, repetitions)

    def nothing(index):
        return {"sample": torch.zeros(1, 1)}

    return estimate_fisher(model, loss, {name: weight}, nothing, indices, terms=terms)


@pytest.mark.parametrize(
    ("num_terms", "terms"),
    [(13, 4), (12, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((12, 4), (12, 1), (30, 7)))],
)
def test_closed_form_of_a_linear_gaussian_model(num_terms, terms):
    """F = M^2 + V exactly; the cheap estimator has M^2 + r (V' + W), with V' = V/r for strata of one size."""
    means = torch.linspace(0.5, 1.5, num_terms, dtype=torch.float64)
    deviations = torch.linspace(3.0, 1.0, num_terms, dtype=torch.float64)
    sums = known_sums(means, deviations, terms)
    fisher = sums.finish({})
    signal, noise = means.sum().item() ** 2, deviations.square().sum().item()
    expected = signal + noise
    if terms is not None:
        edges = [k * num_terms // terms for k in range(terms + 1)]
        strata = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        inflated = sum((s.stop - s.start) * deviations[s].square().sum().item() for s in strata)
        within = sum((s.stop - s.start) ** 2 * means[s].var(unbiased=False).item() for s in strata)
        ratio = terms / num_terms
        expected = signal + ratio * (inflated + within)
        if num_terms % terms == 0:
            assert inflated == pytest.approx(noise / ratio)  # what the docstring of the module says
        # Without the scale the noise counts 1/r times: far outside the error of this test.
        squared = signal + inflated + within
        assert (sums.square["weight"] / SAMPLES).mean().item() == pytest.approx(squared, rel=0.05)
        assert expected < 0.8 * squared
    assert fisher.tensors["weight"].mean().item() == pytest.approx(expected, rel=0.05)


def test_tensors_of_nothing_but_noise_are_not_scaled_as_those_with_signal():
    """Of 20 samples their sum of U is often below 0; they must not get the scale that a large tensor decides."""
    num_terms = 20
    signal = known_sums(torch.ones(num_terms), 0.1 * torch.ones(num_terms), 1, 50, range(20), "signal")
    found = []
    for start in range(0, 400, 20):
        none = known_sums(torch.zeros(num_terms), torch.ones(num_terms), 1, 2, range(start, start + 20), "noise")
        both = FisherSums(
            signal.square | none.square, signal.totals | none.totals, signal.unbiased | none.unbiased, none.ratio
        ).finish({})
        assert both.metadata["scale"] > 0.5
        if none.totals["noise"][1] <= 0:
            found.append(both.tensors["noise"].mean().item() * len(none.unbiased | signal.unbiased) / 20)
    assert len(found) > 5 and num_terms / 2 < min(found) and max(found) < 2 * num_terms  # V, which it estimates


@pytest.mark.parametrize(("weights", "samples"), [(1, 16), (2, 32), (1, 100)])
def test_tensors_of_few_weights_and_all_noise_are_counted_and_too_high_by_what_is_said(weights, samples):
    """400 of them, whose two draws of a sample have nothing in common, beside one of all signal."""
    first, second = torch.randn(2, samples, 400, weights, dtype=torch.float64)
    squares, products = (first**2 + second**2) / 2, first * second
    pairs = zip(squares.sum((0, 2)).tolist(), (0.95 * products + 0.05 * squares).sum((0, 2)).tolist(), strict=True)
    totals = {"signal": (1e6, 1e6)} | {f"noise {i}": pair for i, pair in enumerate(pairs)}
    square = {"signal": torch.ones(1000)} | {f"noise {i}": part for i, part in enumerate(squares.sum(0))}
    fisher = FisherSums(square, totals, dict.fromkeys(range(samples), 1.0), 0.05).finish({})
    scales = torch.cat([samples * fisher.tensors[name] / square[name] for name in square if name != "signal"])
    assert scales.mean().item() == pytest.approx(0.05 + 0.4 * 0.95 / (samples * weights) ** 0.5, rel=0.12)
    assert 385 <= fisher.metadata["num_noisy_tensors"] < 400 and (fisher.tensors["signal"] == 1 / samples).all()


def test_is_not_the_square_of_the_batch_mean():
    """The mistake seen in the field: the gradients of N samples average out first, which leaves V / N of V."""
    means, deviations = torch.zeros(10, dtype=torch.float64), torch.ones(10, dtype=torch.float64)
    fisher = known_sums(means, deviations, None).finish({})
    weight = nn.Parameter(torch.zeros(REPETITIONS, dtype=torch.float64))
    loss, batch = KnownGradients(means, deviations, REPETITIONS), {"sample": torch.zeros(10 * SAMPLES, 1)}
    noise = loss.sample_noise(batch, torch.Generator().manual_seed(0))
    terms = torch.arange(10).repeat(SAMPLES)
    (mean,) = torch.autograd.grad(loss(SimpleNamespace(weight=weight), batch, terms, noise).sum() / SAMPLES, weight)
    assert fisher.tensors["weight"].mean().item() == pytest.approx(10.0, rel=0.05)
    assert mean.square().mean().item() == pytest.approx(10.0 / SAMPLES, rel=0.3)


@pytest.mark.parametrize(("num_terms", "count"), [(10, 1), (10, 5), (10, 10), (1000, 7), (20, 3)])
def test_strata_cover_all_timesteps_and_weights_sum_to_their_number(num_terms, count):
    hits = torch.zeros(num_terms)
    edges = [k * num_terms // count for k in range(count + 1)]
    for seed in range(300):
        terms, weights = stratified_terms(num_terms, count, torch.Generator().manual_seed(seed))
        assert [a <= t < b for t, a, b in zip(terms.tolist(), edges, edges[1:], strict=False)] == [True] * count
        assert weights.tolist() == [b - a for a, b in zip(edges, edges[1:], strict=False)]
        hits[terms] += 1
    if num_terms <= 20:
        assert hits.min() > 0
    assert weights.sum() == num_terms
    assert max(weights) - min(weights) <= 1


@pytest.mark.parametrize("terms", [0, -1, T + 1])
def test_number_of_terms_out_of_range(model, loss, terms):
    with pytest.raises(ValueError, match=f"between 1 and {T} .* got {terms}"):
        run(model, loss, terms=terms)


def test_a_gradient_that_is_not_finite_names_the_sample(model, loss):
    def broken(index):
        return {"sample": sample(index)["sample"] * (math.nan if index == 2 else 1)}

    sums = FisherSums.zeros(dict(model.named_parameters()))
    with pytest.raises(FloatingPointError, match="sample 2 is not finite"):
        estimate_fisher(model, loss, dict(model.named_parameters()), broken, INDICES, terms=None, sums=sums)
    assert list(sums.unbiased) == [0, 1]
    assert all(value.isfinite().all() for value in sums.square.values())


def test_a_negative_scale_is_refused():
    sums = FisherSums({"weight": torch.ones(2)}, {0: (2.0, -0.1)})
    with pytest.raises(ValueError, match="raise --fisher_samples"):
        sums.finish({})


def test_save_and_load(model, loss, tmp_path):
    fisher = run(model, loss, terms=3).finish(METADATA)
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = Fisher.load(tmp_path / "fisher.safetensors")
    assert loaded.metadata == fisher.metadata
    torch.testing.assert_close(loaded.tensors, fisher.tensors, rtol=0, atol=0)


def test_check_names_every_field_that_differs():
    fisher = Fisher({}, METADATA)
    fisher.check(**METADATA)
    with pytest.raises(FisherMismatch) as error:
        fisher.check(model_hash="cd34", reduction="sum", num_terms=T)
    assert "model_hash: the Fisher has 'ab12', this run 'cd34'" in str(error.value)
    assert "reduction: the Fisher has 'mean', this run 'sum'" in str(error.value)
    assert "num_terms" not in str(error.value)


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Fisher at"):
        Fisher.load(tmp_path / "absent.safetensors")
    save_file({"weight": torch.ones(1)}, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(FisherMismatch, match="its header says pt"):
        Fisher.load(tmp_path / "weights.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"not a safetensors file at all")
    with pytest.raises(FisherMismatch, match="is no readable Fisher"):
        Fisher.load(tmp_path / "garbage.safetensors")
