"""A family and a method that nothing in the package knows of, as the documentation's walkthroughs have them."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from sa_diffusers import forget, methods
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.families import base as families
from sa_diffusers.families import family_class, get_family
from sa_diffusers.methods import base as registered
from sa_diffusers.runs import options as run_options


DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("new_family", "new_method")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The pages' modules, run from beginning to end in an empty folder; both toys are registered for as long."""
    folder = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "_REGISTRY", dict(families.registry()))
        patch.setattr(registered, "_REGISTRY", dict(methods.registry()))
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        for page in PAGES:
            blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S)
            (folder / f"{page}.py").write_text("\n".join(blocks))
        yield [import_module(page) for page in PAGES]
        for page in PAGES:
            del sys.modules[page]


def test_the_page_on_methods_runs(toys):
    family, method = toys
    before, pulled = family.before, method.pulled
    assert type(pulled) is family.BrightnessPipeline
    levels = pulled.model.level.tolist()
    assert levels[2] == pytest.approx(levels[0], abs=0.1)
    assert levels[:2] == pytest.approx(before.model.level.tolist()[:2])
    folder = Path("runs/pulled")
    assert sorted(path.stem for path in (folder / ".stages").iterdir()) == [
        "after", "before", "run", "surrogate", "train"
    ]  # fmt: skip
    assert "Pulling" in (folder / "pipeline" / "README.md").read_text()
    assert "Pulling" in (folder / "report.html").read_text()


def test_what_a_run_of_the_page_says(toys, tmp_path, capsys):
    options = {"method": "pull", "num_train_steps": 2, "num_surrogate_samples": 8}
    forget(toys[0].before, "bright", "dark", output_dir=tmp_path, **options)
    said = capsys.readouterr().out
    assert "2 steps of 8" in said and "8 pictures: the text 'dark'" in said


def test_the_page_on_families_runs_by_another_method(toys):
    assert Path("runs/bright/fisher.safetensors").exists()
    assert toys[0].forgotten.model.level[2] < 0.4


def test_a_saved_pipeline_is_loaded_by_its_own_class(toys, tmp_path):
    from sa_diffusers.io.loading import load_pipeline

    toys[0].before.save_pretrained(tmp_path / "pipeline")
    loaded = load_pipeline(str(tmp_path / "pipeline"), None, None, "float32")
    assert type(get_family(loaded)) is toys[0].BrightnessFamily is family_class("BrightnessPipeline")


def test_what_the_family_cannot_do_is_refused(toys):
    with pytest.raises(ValueError, match="esd-x needs a model that"):
        forget(toys[0].before, "bright", "dark", method="esd-x")
    with pytest.raises(ValueError, match="expected train_scope to be one of full, got 'xattn'"):
        forget(toys[0].before, "bright", "dark", train_scope="xattn")


def test_help_and_command_line_know_the_method(toys, capsys):
    config = parse_config(run_options.ForgetConfig, ["--method", "pull", "--pull_strength", "3"])
    assert (config.method, config.pull_strength, config.resolved().ewc_lambda) == ("pull", 3.0, 0.0)
    for topic, expected in {"methods": "pull: pull towards the surrogate", "pull": "How hard the concept is"}.items():
        with pytest.raises(SystemExit):
            parse_config(run_options.ForgetConfig, ["--help", topic])
        assert expected in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        parse_config(run_options.ForgetConfig, ["--method", "pull", "--pull_strength", "0"])
    assert "expected pull_strength > 0, got 0.0" in capsys.readouterr().err
