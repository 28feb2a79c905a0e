"""What the benchmark counts, its baselines against ours, and its extrapolations. No time is asserted."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher import FisherSums, estimate_fisher, stratified_terms
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import ElasticWeightConsolidation, SelectiveAmnesia
from sa_diffusers.core.objectives import ewc as ewc_module
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.sampling import Request
from sa_diffusers.families import get_family
from sa_diffusers.runs.options import ForgetConfig
from scripts import benchmark
from studies.costs import architectures, authors, counting, estimate, memory, stages, timing


CPU = torch.device("cpu")
LORA = "LoRA of rank 16, checkpointing"
PROMPTS = ["a red seven", "two", "a blue nine on white"]


def meta(build, *arguments):
    with torch.device("meta"):
        return build(*arguments)


@pytest.fixture(scope="module")
def real() -> StableDiffusionPipeline:
    """Of the real size, without values."""
    return architectures.build_stable_diffusion("meta")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def family(tiny_pipeline):
    return get_family(tiny_pipeline())


def make_batch(family, size: int, seed: int) -> dict:
    latents = torch.randn(size, *family.latent_shape, generator=seeded(seed))
    return family.batch(latents, [Condition(PROMPTS[i % len(PROMPTS)]) for i in range(size)])


# Architectures


@pytest.mark.slow
def test_architectures_have_the_weights_of_the_real_ones(real):
    assert [count(part) for part in (real.unet, real.vae, real.text_encoder)] == [859_520_964, 83_653_863, 123_060_480]


@pytest.mark.slow
def test_attention_is_built_as_in_the_real_one(real):
    """It does not show in the number of weights."""
    attention = real.unet.down_blocks[0].attentions[0]
    assert type(attention.proj_in) is nn.Conv2d and attention.transformer_blocks[0].attn1.heads == 8
    assert attention.norm.num_groups == 32


@pytest.mark.slow
def test_the_pipeline_is_one_that_a_family_takes(real):
    family = get_family(real)
    assert (family.loss.num_terms, family.loss.prediction_type, family.resolution) == (1000, "epsilon", 512)
    tokens = real.tokenizer(["a red cat"], padding="max_length", return_tensors="pt").input_ids
    assert tokens.shape == (1, 77) and int(tokens.max()) == real.text_encoder.config.eos_token_id
    text = real.text_encoder(tokens.to("meta"))[0]
    latents, timesteps, _ = counting.unet_inputs(real.unet, 1, 8)
    assert real.unet(latents, timesteps, text).sample.shape == (1, 4, 8, 8)


# Counting bytes


def test_bytes_are_of_new_storages_that_are_alive():
    before = torch.zeros(256)
    with timing.TensorBytes() as counter:
        before.add_(1)  # in place and views make nothing new
        view = before.view(16, 16)
        assert (counter.now, counter.peak) == (0, 0)
        kept = view + 1
        assert counter.now == 1024
        dropped = torch.cat([kept, kept])
        half = dropped[0]
        del dropped
        assert counter.now == 1024 + 2048  # its view keeps it alive
        del half
        assert (counter.now, counter.peak) == (1024, 3072)
    del kept


def test_bytes_of_a_forward_pass_are_what_autograd_saves():
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with timing.TensorBytes() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randn(64, 8)).sum()
    outside = {p.untyped_storage()._cdata for p in model.parameters()}
    inside = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in outside)
    assert counter.now == inside + loss.nbytes


def test_a_way_holds_each_storage_once_and_makes_what_one_run_makes():
    weight = torch.zeros(100)
    way = timing.Way("s", "a", "unit", 1, lambda: weight + weight, lambda: [weight, weight.view(10, 10)])
    assert timing.peak_bytes(way, CPU) == 800


# Taking turns


def test_ways_take_turns_and_are_compared_within_a_round(monkeypatch):
    """Other load makes the second round ten times slower: the ratio is that of both rounds all the same."""
    clock, calls = [0.0], []
    costs = {"slow": 4.0, "fast": 1.0}

    def way(name: str, units: int, against: str | None = None) -> timing.Way:
        def run() -> None:
            calls.append(name)
            clock[0] += costs[name] * (10 if len(calls) in (7, 8) else 1)

        return timing.Way("stage", name, "unit", units, run, against=against)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    slow, fast = timing.measure([way("slow", 2), way("fast", 1)], 3, CPU)
    assert calls == ["slow", "fast"] + ["slow", "fast"] + ["slow", "fast"] * 3  # warm-up and memory in turns, too
    assert (slow["seconds"], fast["seconds"]) == (2.0, 1.0)
    assert slow["rounds"] == [2.0, 20.0, 2.0] and fast["rounds"] == [1.0, 10.0, 1.0]
    assert (slow["times_faster"], fast["times_faster"], fast["than"]) == (1.0, 2.0, "slow")
    clock[0], calls[:] = 0.0, []
    assert timing.measure([way("slow", 1), way("fast", 1, against="fast")], 1, CPU)[1]["times_faster"] == 1.0
    with pytest.raises(ValueError, match="at least one round, got 0"):
        timing.measure([way("slow", 1)], 0, CPU)


# The authors' way


def test_timesteps_one_by_one_give_our_exact_fisher(family):
    module = family.module.double().requires_grad_(True)
    parameters, loss = dict(module.named_parameters()), family.loss
    batch = {key: value.double() for key, value in make_batch(family, 1, 0).items()}
    ours = estimate_fisher(module, loss, parameters, lambda i: batch, [5], terms=None, chunk_size=7, seed=3)
    generator = seeded(3, "fisher", 5, 0)
    stratified_terms(loss.num_terms, loss.num_terms, generator)
    noise = loss.sample_noise({"sample": batch["sample"].expand(loss.num_terms, -1, -1, -1)}, generator)
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    authors.add_squared_gradient(module, loss, parameters, batch, noise, sums)
    largest = max(float(value.max()) for value in sums.values())
    for name, value in sums.items():
        torch.testing.assert_close(value.float(), ours.square[name], rtol=1e-5, atol=1e-9 * largest)
    assert all(p.grad is None for p in parameters.values())


@pytest.mark.parametrize("one_pass", [True, False])
def test_ewc_through_autograd_has_the_gradient_of_ours(family, one_pass):
    module = family.module.double().requires_grad_(True)
    parameters = dict(module.named_parameters())
    fisher = {name: torch.rand_like(p) for name, p in parameters.items()}
    ewc = ElasticWeightConsolidation(parameters, fisher, 3.0)
    penalty = authors.AutogradEWC(parameters, {n: f.float() for n, f in fisher.items()}, 3.0, "cpu")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = SelectiveAmnesia(family.loss, ewc)
    theirs = authors.AutogradSelectiveAmnesia(family.loss, penalty, one_pass)
    data = {
        n: {k: v.double() for k, v in make_batch(family, 2, i).items()}
        for i, n in enumerate(("surrogate", "replayed"))
    }
    batch = ours.draw(data, seeded(0))
    total, _ = ours(module, batch)
    total.backward()
    ours.add_gradient()
    expected = {name: p.grad.clone() for name, p in parameters.items()}
    module.zero_grad()
    other, _ = theirs(module, batch)
    other.backward()
    torch.testing.assert_close(other, total + ewc.value(), rtol=1e-5, atol=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-9)


def test_pictures_one_by_one_go_through_eight_bits(tiny_pipeline):
    family = get_family(tiny_pipeline(), sampler="ddim")
    requests = [Request(Condition("two"), 4), Request(Condition("a red seven"), 5)]
    latents = authors.draw_one_by_one(family, requests, num_steps=3, guidance_scale=2.0)
    assert latents.shape == (2, *family.latent_shape)
    for request, latent in zip(requests, latents, strict=True):
        pixels = family.decode(family.draw([request.condition], [request.seed], 2.0, 3))
        eight_bits = ((pixels + 1) * 127.5).round() / 127.5 - 1
        expected = family.encode(eight_bits, seeded(request.seed, "encode"))[0]
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-5)


# Stages


def test_thinned_timesteps_are_evenly_spread(family):
    loss = family.loss
    assert torch.equal(stages.thinned(loss, 5).alphas_cumprod, loss.alphas_cumprod[::4])
    assert stages.thinned(loss, 5).num_terms == 5
    assert torch.equal(stages.thinned(loss, 20).alphas_cumprod, loss.alphas_cumprod)
    with pytest.raises(ValueError, match="between 1 and 20 timesteps, got 21"):
        stages.thinned(loss, 21)


@pytest.mark.slow
def test_every_way_of_fisher_and_training_runs(family):
    config = ForgetConfig(
        concept="seven", surrogate="three", train_batch_size=4, fisher_terms="2", fisher_chunk_size=2
    ).resolved()
    load = stages.Workload(images=2, images_one_by_one=1, timesteps=4, cheap_samples=2, steps=1)
    rows = timing.measure(stages.fisher_ways(family, PROMPTS, config, load), 1, CPU)
    assert [row["unit"] for row in rows] == ["evaluation"] * 3
    held = 4 * count(family.module)
    assert all(row["peak_bytes"] > 3 * held for row in rows)  # weights, gradient, sums
    before = {name: p.detach().clone() for name, p in family.module.named_parameters()}
    rows += timing.measure(stages.training_ways(family, PROMPTS, config, load), 1, CPU)
    assert all(row["seconds"] > 0 and len(row["rounds"]) == 1 for row in rows)
    peaks = {row["way"]: row["peak_bytes"] for row in rows}
    assert peaks[stages.EWC] - peaks[stages.WITHOUT_EWC] == pytest.approx(2 * held, rel=0.5)  # Fisher and anchor
    for name, parameter in family.module.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-4)


# Whole runs


def test_whole_runs_are_units_times_their_costs():
    job = estimate.Job("j", 10, 5, 100, 3, 8, evaluation_images=2)
    costs = estimate.Costs(image_step=1.0, fisher_evaluation=2.0, training_sample=4.0, decoded_image=7.0)
    expected = {"sampling": 50.0, "Fisher": 200.0, "training": 96.0, "evaluation": 24.0, "total": 370.0}
    assert estimate.extrapolate(job, costs) == expected


def test_jobs_count_what_the_configurations_say():
    config = ForgetConfig(
        concept="x", surrogate="y", num_samples=2000, empty_prompt_fraction=0.1, num_surrogate_samples=400,
        num_inference_steps=20, fisher_samples=1000, fisher_terms="10", num_train_steps=250, train_batch_size=8,
    ).resolved()  # fmt: skip
    assert estimate.job_of(config, "n") == estimate.Job("n", 2600, 20, 20_000, 250, 16)
    config.fisher_terms, config.replay_negative = "all", "none"
    assert estimate.job_of(config, "n") == estimate.Job("n", 2400, 20, 1_000_000, 250, 16)
    config.ewc_lambda = 0.0
    assert estimate.job_of(config, "n").fisher_evaluations == 0
    theirs = estimate.AUTHORS
    assert (theirs.fisher_evaluations, theirs.train_steps * theirs.samples_per_step) == (5_000_000, 400_000)


def test_costs_are_read_off_the_rows():
    rows = [
        {"stage": stage, "way": way, "seconds": seconds}
        for stage, way, seconds in [
            ("sampling", "a", 10.0), ("sampling", "b", 1.0), ("Fisher", "a", 3.0), ("training step", "a", 8.0)
        ]
    ]  # fmt: skip
    assert estimate.measured_costs(rows, ("a", 50), "a", ("a", 4)) == estimate.Costs(0.2, 3.0, 2.0)


# Counting without running


def flops_by_hand(unet: nn.Module, inputs: tuple) -> int:
    """From the shapes that go through convolutions, linear layers and attention."""
    total = [0]

    def convolution(layer, _, output):
        total[0] += 2 * output.numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]

    def linear(layer, _, output):
        total[0] += 2 * output.numel() * layer.in_features

    def attention(layer, args, kwargs, output):
        tokens, text = args[0] if args else kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
        others = tokens.shape[1] if text is None else text.shape[1]
        total[0] += 2 * 2 * tokens.shape[0] * tokens.shape[1] * others * layer.inner_dim

    handles = []
    for layer in unet.modules():
        if isinstance(layer, nn.Conv2d):
            handles.append(layer.register_forward_hook(convolution))
        elif isinstance(layer, nn.Linear):
            handles.append(layer.register_forward_hook(linear))
        elif type(layer).__name__ == "Attention":
            handles.append(layer.register_forward_hook(attention, with_kwargs=True))
    with torch.no_grad():
        unet(*inputs)
    for handle in handles:
        handle.remove()
    return total[0]


def test_operations_are_those_of_the_layers(tiny_pipeline):
    small = tiny_pipeline().unet.to("meta")
    assert counting.forward_flops(small, 8) == flops_by_hand(small, counting.unet_inputs(small, 1, 8))


@pytest.mark.slow
def test_operations_of_the_real_size_are_those_of_the_layers(real):
    unet = real.unet
    flops = counting.forward_flops(unet)
    assert flops == flops_by_hand(unet, counting.unet_inputs(unet, 1, 64)) == 803_273_441_280


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_on_meta_are_those_of_a_real_step(tiny_pipeline, checkpointing):
    real, shadow = tiny_pipeline().unet.requires_grad_(True), tiny_pipeline().unet.requires_grad_(True).to("meta")
    counted = counting.step_bytes(shadow, 32, None, checkpointing, size=8)
    inputs = [torch.zeros_like(t, device="cpu") for t in counting.unet_inputs(real, 32, 8)]
    if checkpointing:
        real.train().enable_gradient_checkpointing()
    with timing.TensorBytes() as counter:
        real(*inputs).sample.square().mean().backward()
    assert counted == pytest.approx(counter.peak, rel=0.05)
    assert not shadow.is_gradient_checkpointing and all(p.grad is None for p in shadow.parameters())


def test_bytes_on_meta_are_those_of_real_sampling(tiny_pipeline):
    real, shadow = tiny_pipeline().unet.requires_grad_(False), tiny_pipeline().unet.to("meta")
    inputs = [torch.zeros_like(t, device="cpu") for t in counting.unet_inputs(real, 32, 8)]
    with timing.TensorBytes() as counter:
        real(*inputs)
    assert counting.forward_bytes(shadow, 32, None, size=8) == pytest.approx(counter.peak, rel=0.05)


def test_meta_tensors_are_cast_as_on_a_gpu():
    layer, norm = meta(nn.Linear, 8, 8), meta(nn.GroupNorm, 2, 8)
    x = torch.empty(2, 8, device="meta")
    with counting.CudaKernels(torch.bfloat16):
        half = layer(x)
        assert half.dtype == F.silu(half).dtype == torch.bfloat16
        assert norm(half).dtype == (half + x).dtype == torch.float32
    with counting.CudaKernels(None):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_attention_keeps_no_products(dtype):
    tokens = torch.empty(1, 2, 4096, 8, device="meta", requires_grad=True)
    with timing.TensorBytes() as counter, counting.CudaKernels(dtype):
        F.scaled_dot_product_attention(tokens, tokens, tokens)
        assert counter.peak < 10 * tokens.nbytes < 2 * 4096**2
        with pytest.raises(ValueError, match="without a mask"):
            F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=tokens)


def test_what_an_update_takes_for_a_moment(monkeypatch):
    """AdamW a copy of the weights, EWC the pull of a group of tensors."""
    monkeypatch.setattr(ewc_module, "GROUP_SIZE", 4 * 64 * 64)
    parameters = [nn.Parameter(torch.zeros(64, 64)) for _ in range(32)]
    optimizer = torch.optim.AdamW(parameters, foreach=True, weight_decay=0.0)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with timing.TensorBytes() as counter:
            optimizer.step()
    assert counter.peak == pytest.approx(sum(p.nbytes for p in parameters), rel=0.01)
    by_name = {str(index): parameter for index, parameter in enumerate(parameters)}
    fisher = {name: torch.ones_like(p) for name, p in by_name.items()}
    anchor = {name: p.detach().clone() for name, p in by_name.items()}
    for dtype in (torch.float32, torch.bfloat16):
        ewc = ElasticWeightConsolidation(by_name, fisher, 1.0, anchor=anchor, fisher_dtype=dtype)
        with timing.TensorBytes() as counter:
            ewc.add_gradient()
        taken = memory.ewc_temporary([p.numel() for p in parameters], dtype != torch.float32)
        assert 0.7 * taken < counter.peak <= taken


class Passes(TorchDispatchMode):
    """Numbers read and written by operators within the block, of those that go through all of many tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "_foreach" in str(function):
            given = [leaf.numel() for leaf in tree_iter(args) if isinstance(leaf, torch.Tensor)]
            # An operator in place returns nothing, and writes what it was given first.
            made = [leaf.numel() for leaf in tree_iter(args[0] if result is None else result)]
            self.count += sum(given) + sum(made)
        return result


@pytest.mark.slow
def test_what_ewc_adds_is_what_it_reads_and_writes():
    parameters = {str(index): nn.Parameter(torch.zeros(64, 64)) for index in range(3)}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    anchor = {name: p.detach().clone() for name, p in parameters.items()}
    ewc = ElasticWeightConsolidation(parameters, {n: torch.ones(64, 64) for n in parameters}, 1.0, anchor=anchor)
    with Passes() as passes:
        ewc.add_gradient()
    assert passes.count == estimate.EWC_PASSES * 3 * 64 * 64
    small, default = estimate.estimate_ewc((8, 16))
    seconds = passes.count / (3 * 64 * 64) * estimate.WEIGHTS / estimate.BANDWIDTH
    plain = 3 * 8 * estimate.operations()[0] / (0.2 * estimate.PEAK)
    plain += (estimate.STEP_PASSES - estimate.EWC_PASSES) * estimate.WEIGHTS / estimate.BANDWIDTH
    assert small["20% of peak"] == pytest.approx(seconds / plain)
    assert all(default[name] < 0.05 for name in default if name != "samples")


@pytest.mark.parametrize("terms", [None, 10])
@pytest.mark.slow
def test_samples_of_the_fisher_do_not_pile_up(tiny_pipeline, terms):
    """What one sample takes beside the sums: two gradients and a pass; two samples take no more."""
    unet = tiny_pipeline().unet.requires_grad_(True)
    loss = DiffusionLoss(torch.linspace(0.99, 0.1, 20))
    shapes = counting.unet_inputs(unet, 1, 8)
    batch = {"sample": torch.ones(shapes[0].shape), "encoder_hidden_states": torch.ones(shapes[2].shape)}
    parameters = dict(unet.named_parameters())
    peaks = []
    for samples in (1, 2):
        sums = FisherSums.zeros(parameters)
        with timing.TensorBytes() as counter:
            estimate_fisher(
                unet, loss, parameters, lambda i: batch, range(samples), terms=terms, chunk_size=5, sums=sums
            )
        peaks.append(counter.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


@pytest.mark.slow
def test_the_whole_job_fits_its_time_at_the_stated_rate():
    forward, decoding = estimate.operations()
    costs = estimate.estimate_costs(2e14)
    assert costs.image_step == pytest.approx(2 * forward / 2e14, rel=0.05) and costs.image_step > 2 * forward / 2e14
    assert costs.decoded_image == pytest.approx(decoding / 2e14)
    assert costs.fisher_evaluation > 3 * forward / 2e14 and costs.training_sample > 3.5 * forward / 2e14
    for job, minutes in ((estimate.FROM_NOTHING, 30), (estimate.SHARED, 6)):
        share = estimate.share_needed(job, 60 * minutes)
        assert share < 0.28  # what was published of training on A100s
        seconds = estimate.extrapolate(job, estimate.estimate_costs(share * estimate.PEAK))["total"]
        assert seconds + estimate.file_seconds(job) == pytest.approx(60 * minutes)
    # A Fisher of 3.4 GB is written eleven times, or read once.
    more = estimate.file_seconds(estimate.FROM_NOTHING) - estimate.file_seconds(estimate.SHARED)
    assert more == pytest.approx(10 * estimate.WEIGHTS / 2e9)
    assert estimate.file_seconds(estimate.SHARED) > (2 * 4.2e9 + 2 * 10.3e9 + 3.4e9) / 2e9


# The script


def run(monkeypatch, tmp_path, *options: str) -> dict:
    monkeypatch.setattr("sys.argv", ["benchmark.py", *options, "--output_dir", str(tmp_path)])
    benchmark.main()
    return json.loads((tmp_path / "benchmark.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "tiny", "--estimate"], "expected another --size than tiny"),
        (["--size", "tiny", "--rounds", "0"], "at least one round, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path, *options)
    assert stopped.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_sd14_needs_a_gpu(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--size", "sd14")
    assert "needs a GPU, and there is none; --estimate" in capsys.readouterr().err


@pytest.mark.slow
def test_tiny_in_one_short_run(monkeypatch, tmp_path, capsys):
    options = (
        "--size tiny --rounds 1 --training_rounds 1 --images 2 --images_one_by_one 1 --timesteps 10 --cheap_samples 1"
    )
    report = run(monkeypatch, tmp_path, *options.split())
    measured = [(row["stage"], row["way"]) for row in report["stages"]]
    assert [stage for stage, _ in measured] == ["sampling"] * 2 + ["Fisher"] * 3 + ["training step"] * 7
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in report["stages"])
    runs = report["whole_runs"]
    assert [(r["run"], r["way"]) for r in runs[:2]] == [("the authors' settings", w) for w in ("authors", "ours")]
    evaluation = next(
        row["seconds"] for row in report["stages"] if (row["stage"], row["way"]) == ("Fisher", "authors")
    )
    assert runs[0]["seconds"]["Fisher"] == pytest.approx(5_000_000 * evaluation)
    step = next(row["seconds"] for row in report["stages"] if row["way"] == stages.FROZEN)
    assert runs[2]["seconds"]["training"] == pytest.approx(250 * 16 / 32 * step)  # the configuration's 16 + 16
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    assert "Extrapolated to whole runs" in text and all(f"| {way} |" in text for _, way in measured)


def assert_training_fits_the_memory_it_should(trainings: list[dict], before_training: list[dict]) -> None:
    """A gigabyte is left to CUDA and the allocator: 24 GB for all weights, 12 GB for LoRA, both at 4 + 4 samples."""
    rows = {row["training"]: row for row in trainings}
    assert rows["full, checkpointing, 8-bit Adam"]["peak"] < 23
    assert rows[LORA]["peak"] < 11
    weights = estimate.WEIGHTS / 1e9
    full = rows["full, checkpointing, 8-bit Adam"]
    assert full["weights"] == full["gradients"] == full["Fisher"] == full["frozen copy or anchor"] == weights
    assert full["Adam"] == pytest.approx(weights / 2 * (1 + 1 / 64))
    parts = sum(full[key] for key in ("weights", "Adam", "frozen copy or anchor", "Fisher", "gradients"))
    assert full["peak"] == pytest.approx(parts + max(full["activations"], full["update's temporaries"]))
    before = {row["stage"]: row["peak"] for row in before_training}
    assert before["sampling, 8 latents"] < before["decoding, 4 at once"] < before["Fisher, checkpointing"] < 11
    assert before["Fisher, checkpointing, sums on the GPU"] < 23
    on_device = before["Fisher, checkpointing, sums on the GPU"] - before["Fisher, checkpointing"]
    assert on_device == pytest.approx(2 * weights)  # the sums and the first draw


@pytest.mark.slow("minutes")
def test_the_estimate_of_sd14(monkeypatch, tmp_path, capsys):
    report = run(monkeypatch, tmp_path, "--size", "sd14", "--estimate")
    assert {row["job"] for row in report["times"]} == {"nothing cached", "samples and Fisher shared"}
    assert len(report["memory"]) == len(memory.TRAININGS)
    assert len(report["stage_memory"]) == 6 and len(report["ewc_share"]) == 2
    assert "not measured" in capsys.readouterr().out
    assert_training_fits_the_memory_it_should(report["memory"], report["stage_memory"])
