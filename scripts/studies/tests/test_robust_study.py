"""The table of the robust study: means over the seeds that a number was taken in."""

from studies.robust import table


def test_a_number_of_one_seed_stands_beside_means_of_all():
    rows = {
        "original": [{"unseen": 0.9, "seconds": 0.0, "four vectors": 1.0}, {"unseen": 0.7, "seconds": 0.0}],
        "sa-robust": [{"unseen": 0.1, "seconds": 80.4, "four vectors": 0.2}, {"unseen": 0.0, "seconds": 90}],
    }
    lines = [line.strip("| ").split(" | ") for line in table(rows).splitlines()]
    assert lines[0] == ["row", "unseen", "seconds", "four vectors"]
    assert lines[2:] == [["original", "0.800", "0", "1.000"], ["sa-robust", "0.050", "85", "0.200"]]
