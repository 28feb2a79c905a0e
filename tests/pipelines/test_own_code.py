"""Pipelines that are saved with their code: diffusers alone loads them, and this package without trusting any code."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from tiny_mae import tiny_mae
from tiny_tokens import tiny_tokens
from torch.testing import assert_close

from sa_diffusers.families.completion.networks import build_pixel_inpaint
from sa_diffusers.io.loading import check_model, load_pipeline
from sa_diffusers.models import TokenTransformer
from sa_diffusers.pipelines import TokenInpaintPipeline
from sa_diffusers.runs.base.pixels import PixelInpaintConfig


def tiny_pixels():
    options = PixelInpaintConfig(
        image_size=8, block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, num_train_timesteps=20
    )
    return build_pixel_inpaint(options, 1, 0)


MADE = {"mae": tiny_mae, "tokens": tiny_tokens, "pixels": tiny_pixels}
IMAGE = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
HOLE = torch.zeros(1, 1, 8, 8).index_fill(3, torch.tensor([4]), 1.0)


def filled(pipeline) -> torch.Tensor:
    return pipeline(IMAGE, HOLE, torch.Generator().manual_seed(2), output_type="pt").images


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_diffusers_alone_loads_it_and_saves_it_again(name, tmp_path):
    pipeline = MADE[name]()
    pipeline.save_pretrained(tmp_path / "saved")
    torch.save([IMAGE, HOLE, filled(pipeline)], tmp_path / "expected.pt")
    code = """
import sys
sys.modules["sa_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
image, hole, expected = torch.load("expected.pt")
for source, copy in (("saved", "again"), ("again", "third")):
    pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    found = pipeline(image, hole, torch.Generator().manual_seed(2), output_type="pt").images
    torch.testing.assert_close(found, expected)
    pipeline.save_pretrained(copy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    files = {p.relative_to(tmp_path / "saved"): p.read_text() for p in (tmp_path / "saved").rglob("*.py")}
    assert {p.relative_to(tmp_path / "third"): p.read_text() for p in (tmp_path / "third").rglob("*.py")} == files
    assert_close(filled(load_pipeline(str(tmp_path / "third"), None, None, "float32")), filled(pipeline))


@pytest.mark.parametrize("name", MADE)
def test_its_code_imports_nothing_of_this_package_and_is_not_run_by_it(name, tmp_path):
    pipeline = MADE[name]()
    pipeline.save_pretrained(tmp_path)
    files = list(tmp_path.rglob("*.py"))
    assert len(files) == 1 + (name == "tokens")
    for file in files:
        assert not any(line.startswith(("from sa_diffusers", "import sa_diffusers")) for line in open(file))
        file.write_text("raise RuntimeError")
    check_model(str(tmp_path))
    loaded = load_pipeline(str(tmp_path), None, None, "float32")
    assert type(loaded) is type(pipeline)
    assert_close(filled(loaded), filled(pipeline))
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_parts_of_this_package_are_found_in_older_folders_too(tmp_path):
    pipeline = tiny_tokens()
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["token_transformer", "TokenTransformer"]
    index |= {"transformer": [TokenTransformer.__module__, "TokenTransformer"], "_class_name": "TokenInpaintPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for file in tmp_path.rglob("*.py"):
        file.unlink()
    loaded = TokenInpaintPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is TokenTransformer and isinstance(loaded.transformer, ModelMixin)
