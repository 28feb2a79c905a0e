"""Some of the inputs once more, each as a process of its own: what a shell sees of a refusal."""

import subprocess
import sys

import pytest


BUNDLED = ("forget", "--model", "bundled/digits/pipeline", "--concept", "seven")
CASES = {
    "a misspelt option": ((*BUNDLED, "--lerning_rate", "1"), "did you mean"),
    "another encoding": ((*BUNDLED, "--replay_prompts", "latin.txt"), "latin.txt"),
    "a folder that is no pipeline": (("forget", "--model", ".", "--concept", "seven"), "model_index.json"),
    "YAML that is none": (("forget", "--config", "broken.yaml"), "broken.yaml"),
}


@pytest.mark.slow
def test_a_shell_sees_one_line_and_an_exit_code(tmp_path):
    (tmp_path / "latin.txt").write_bytes("un café\n".encode("latin-1"))
    (tmp_path / "broken.yaml").write_text("concept: [seven\n")
    wrong = {}
    for name, (argv, says) in CASES.items():
        command = [sys.executable, "-m", "sa_diffusers", *argv]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        line = ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else ""
        if ended.returncode not in (1, 2) or says not in line or "Traceback" in ended.stderr:
            wrong[name] = (ended.returncode, ended.stderr[-800:])
    assert wrong == {}
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path / "runs").exists()
