"""What a run tells programs and notebooks, and its verdict where no classifier judges."""

import json

import pytest
from cheap_runs import CHEAP, PROMPTS

from sa_diffusers import RunStopped, forget
from sa_diffusers.cli.forget import main


@pytest.fixture
def options(few_pictures, tmp_path) -> dict:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "templates.txt").write_text("a {}\na red {}")
    files = {"replay_prompts": str(tmp_path / "prompts.txt"), "concept_templates": str(tmp_path / "templates.txt")}
    return CHEAP | files | {"ewc_lambda": 0.0, "replay_weight": 0.0, "num_train_steps": 2}


@pytest.mark.slow
def test_events_pictures_verdict_and_notebook_without_a_folder(tiny_pipeline, options, capfd):
    events, pipeline = [], tiny_pipeline()
    forgotten = forget(pipeline, "seven, 7", "nine", progress=False, callback=events.append, **options)
    said = capfd.readouterr()
    assert "Plan for" not in said.out and "train" not in said.out and said.err == ""
    assert type(forgotten) is type(pipeline)
    ended = [event["stage"] for event in events if event["event"] == "ended"]
    assert {"before", "surrogate"} == set(ended[:2]) and ended[-2:] == ["train", "after"]
    verdict = forgotten.metrics["verdict"]
    assert {"said": events[-1]["said"], "advice": events[-1]["advice"]} == verdict
    assert "the original model itself prefers it to “nine” in" in verdict["said"]
    low, high = forgotten.metrics["intervals"]["after"]["concept_preference"]
    assert 0 <= low <= forgotten.metrics["after"]["concept_preference"] <= high <= 1
    shown = forgotten.pictures
    assert {pair["group"] for pair in shown} == {"Concept", "Retained"} and shown[0]["before"].size == (16, 16)
    html = forgotten._repr_html_()
    assert "Concept preferred" in html and "data:image/png;base64," in html and verdict["said"][:9] in html


@pytest.mark.slow
def test_a_callback_stops_a_run_that_then_goes_on(tiny_pipeline, options, tmp_path):
    def stop_before_training(event):
        return not (event["event"] == "begun" and event["stage"] == "train")

    events, call = [], {"output_dir": tmp_path / "run", "progress": False} | options
    with pytest.raises(RunStopped, match="stopped by the callback"):
        forget(tiny_pipeline(), "seven, 7", "nine", callback=stop_before_training, **call)
    forget(tiny_pipeline(), "seven, 7", "nine", callback=events.append, **call)
    reused = {event["stage"]: event["reused"] for event in events if event["event"] == "ended"}
    assert reused["before"] and reused["surrogate"] and not reused["train"] and not reused["after"]


@pytest.mark.slow
def test_quiet_and_a_log_from_the_command_line(tiny_pipeline_dir, options, tmp_path, capfd):
    log = tmp_path / "log.jsonl"
    argv = ["--model", str(tiny_pipeline_dir), "--concept", "seven, 7", "--surrogate", "nine", "--quiet"]
    argv += ["--output_dir", str(tmp_path / "run"), "--log_json", str(log), "--logging_steps", "1"]
    for name, value in (options | {"logging_steps": 1}).items():
        argv += [f"--{name}", json.dumps(value) if not isinstance(value, str) else value]
    main(argv)
    assert "Plan for" not in capfd.readouterr().out
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "losses"] == [1, 2]
    assert lines[-1]["event"] in ("verdict", "message") and {"metrics", "verdict"} <= {line["event"] for line in lines}
    with pytest.raises(SystemExit):
        main([*argv, "--log_json", str(tmp_path / "no_folder" / "log.jsonl")])
    assert "pass another --log_json" in capfd.readouterr().err
