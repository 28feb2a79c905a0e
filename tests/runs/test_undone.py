"""What a run changes for its own sake is undone after an error, too."""

import signal

import pytest
import torch

from sa_diffusers.cli.parse import friendly_errors
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig


def test_the_module_is_prepared_for_a_while_only(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline().to(torch.bfloat16)
    options = {
        "concept": "seven", "surrogate": "nine", "dtype": "bfloat16", "channels_last": True,
        "compile_backend": "eager", "output_dir": str(tmp_path / "run"), "num_samples": 4,
        "num_inference_steps": 1, "num_surrogate_samples": 2, "fisher_samples": 2, "replay_weight": 0.0,
        "fisher_terms": 100,  # more terms than the model has timesteps
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected between 1 and 20 Fisher terms"):
        run_forgetting(config_from_dict(ForgetConfig, options), pipeline)
    assert pipeline.unet.dtype == torch.bfloat16
    assert pipeline.unet._compiled_call_impl is None
    weight = pipeline.unet.conv_in.weight
    assert weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("error", [None, ValueError("wrong")])
def test_a_signals_handler_is_restored(error):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) if error else friendly_errors(), friendly_errors():
        assert signal.getsignal(signal.SIGTERM) is not before
        if error:
            raise error
    assert signal.getsignal(signal.SIGTERM) is before
