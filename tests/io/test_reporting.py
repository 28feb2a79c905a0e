"""What is told of a run while it works: to the terminal, a file of JSON lines and a callback."""

import json

import pytest

from sa_diffusers.io.processes import RunStopped, progress_bar, reporter, reporting, say, tell, working


def test_work_tells_its_end_once_and_what_is_within_adds_nothing():
    events = []
    with reporting(quiet=True, callback=events.append):
        for item in progress_bar(range(3), "draw", "images"):
            assert list(progress_bar("ab", "decode", "batches")) == ["a", "b"], item
    assert [event["event"] for event in events] == ["begun", "progress", "ended"]
    done, ended = events[1:]
    assert (done["what"], done["done"], done["of"], done["unit"], done["seconds_left"]) == ("draw", 3, 3, "images", 0)
    assert ended["stage"] == "draw" and (ended["count"], ended["of"], ended["reused"]) == (3, "images", False)


def test_work_within_work_of_the_same_unit_adds_to_it():
    events = []
    with reporting(quiet=True, callback=events.append), working("draw", 4, "images"):
        for _ in range(2):
            list(progress_bar(range(2), "a batch", "images"))
    assert [event["done"] for event in events if event["event"] == "progress"] == [4]


def test_resumed_work_counts_from_where_it_was():
    events = []
    with reporting(quiet=True, callback=events.append), working("train", 10, "steps", start=7) as advance:
        advance(3)
    assert (events[1]["from"], events[1]["done"], events[-1]["count"]) == (7, 10, 3)


def test_a_file_gets_a_line_an_event_after_those_that_it_has(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    for text in ("first", "second"):
        with reporting(log_json=file):
            say(text)
    with pytest.raises(ZeroDivisionError), reporting(log_json=file):
        reporter().begin("train", "3 steps")
        1 / 0  # noqa: B018
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["message", "message", "begun", "error"]
    assert lines[1]["text"] == "second" and lines[3]["stage"] == "train"
    assert lines[3]["kind"] == "ZeroDivisionError" and all(line["time"].endswith("+00:00") for line in lines)
    assert capsys.readouterr().out == "first\nsecond\n"


def test_quiet_prints_nothing_and_a_wrong_file_is_an_error(tmp_path, capfd):
    with reporting(quiet=True):
        say("something")
        list(progress_bar(range(2), "draw"))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"cannot write .*no_folder.*pass another --log_json"):
        with reporting(log_json=tmp_path / "no_folder" / "log.jsonl"):
            pass


def test_a_callback_stops_the_work():
    with pytest.raises(RunStopped, match="the same call goes on from there"):
        with reporting(quiet=True, callback=lambda event: event["event"] != "losses"):
            say("goes on")
            tell("losses", step=0, loss=1.0)
    assert reporter().listeners  # as before the block
