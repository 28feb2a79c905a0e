"""The studies' tests have the set-up and the fixtures of the package's."""

from tests.conftest import *  # noqa: F403
