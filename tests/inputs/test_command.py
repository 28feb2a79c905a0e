"""The harness itself, on inputs that any command refuses."""

import pytest


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param(["--concept"], ("--concept", "expected one argument"), id="option without its value"),
        pytest.param(["--concept", "a", "--lerning_rate", "1"], ("--lerning_rate", "learning_rate"), id="misspelt"),
        pytest.param(["--concept", "a", "--seed", "one"], ("--seed", "one"), id="word for a number"),
        pytest.param(["--concept", "a", "--config", "none.yaml"], ("none.yaml",), id="no such file"),
    ],
)
def test_refused_at_once(refused, argv, says):
    refused("forget", *argv, says=says)
