"""What is told of a run while it works: to the terminal, a file of JSON lines and a callback."""

import io
import json
import logging
from contextlib import redirect_stderr

import pytest
from diffusers.utils import logging as diffusers_logging

from sa_diffusers.io.processes import RunStopped, Terminal, progress_bar, reporter, reporting, say, tell, working


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
    with pytest.raises(RunStopped, match="the same call goes on from what was finished"):
        with reporting(quiet=True, callback=lambda event: event["event"] != "losses"):
            say("goes on")
            tell("losses", step=0, loss=1.0)
    assert reporter().listeners  # as before the block


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "interval", "starts"), [(Screen(), 60, 1), (io.StringIO(), 60, 0)])
def test_one_bar_on_a_terminal_and_none_to_a_file(stream, interval, starts):
    terminal = Terminal(interval)
    with redirect_stderr(stream):
        for done in (255, 260, 265):
            terminal({"event": "losses", "loss": 0.5})
            terminal({"event": "progress", "what": "train", "from": 250, "done": done, "of": 300, "unit": "steps"})
        terminal({"event": "error"})
    assert stream.getvalue().count("250/300") == starts


def test_a_line_now_and_then_where_no_terminal_shows_a_bar():
    terminal, stream = Terminal(interval=0), io.StringIO()
    with redirect_stderr(stream):
        for done, seconds in ((1000, 3725.2), (2500, 0.0)):
            terminal({"event": "losses", "loss": 0.5})
            work = {"what": "train", "from": 0, "done": done, "of": 2500, "unit": "steps", "seconds_left": seconds}
            terminal({"event": "progress", **work})
    assert stream.getvalue() == "  train: 1,000 of 2,500 steps, loss=0.5, 1:02:05 left\n"


def test_of_prompts_that_are_cut_diffusers_tells_once(monkeypatch):
    handlers = diffusers_logging.get_logger("diffusers").handlers
    (handler,) = (one for one in handlers if type(one) is logging.StreamHandler)
    logger, lines = diffusers_logging.get_logger("diffusers.pipelines.some"), io.StringIO()
    monkeypatch.setattr(handler, "stream", lines)
    monkeypatch.setattr(logger, "disabled", False)
    cut = ["77 tokens was truncated: ['a']", "77 tokens was truncated: ['b']", "512 tokens was truncated: ['c']"]
    with reporting(quiet=True), reporting(quiet=True):
        for notice in (*cut, "something else", "something else"):
            logger.warning(notice)
    logger.warning(cut[1])
    expected = [cut[0], cut[2], "something else", "something else", cut[1]]
    assert [line for line in lines.getvalue().splitlines() if line] == expected
