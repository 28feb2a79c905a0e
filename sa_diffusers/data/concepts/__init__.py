"""Concepts as a user gives them: one, completed by what ships, and lists of them."""

from sa_diffusers.data.concepts.given import (
    check_surrogate,
    describe_surrogate,
    describe_surrogates,
    find_concept,
    is_folder,
)
from sa_diffusers.data.concepts.lists import (
    Forget,
    Rows,
    as_options,
    concepts_of,
    options_of,
    read_rows,
    split_list,
    split_rows,
)


__all__ = [
    "Forget",
    "Rows",
    "as_options",
    "check_surrogate",
    "concepts_of",
    "describe_surrogate",
    "describe_surrogates",
    "find_concept",
    "is_folder",
    "options_of",
    "read_rows",
    "split_list",
    "split_rows",
]
