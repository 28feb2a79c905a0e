"""Prompts that say which of two things is which: the same words with the two exchanged say something else."""

import re


COLOURS = "red orange yellow green blue purple pink brown black white grey gray".split()
NUMBERS = "two three four five six seven eight nine ten".split()
RELATIONS = "to the left of|to the right of|on top of|in front of|behind|above|below|under|inside"
THING = r"an? (?:[\w-]+ ){0,2}[\w-]+"


def swapped(prompt: str) -> str | None:
    """The prompt with its two colours exchanged, or else its two numbers, or the two things of "a dog behind a tree";
    None: it has no such pair, and of colours or numbers only one or several."""
    for words in (COLOURS, NUMBERS):
        found = list(re.finditer(rf"\b(?:{'|'.join(words)})\b", prompt))
        if len(found) == 2 and len({match[0] for match in found}) == 2 and "black and white" not in prompt:
            one, other = found
            between = prompt[one.end() : other.start()]
            return f"{prompt[: one.start()]}{other[0]}{between}{one[0]}{prompt[other.end() :]}"
    match = re.fullmatch(rf"({THING}) ({RELATIONS}) ({THING})", prompt)
    return f"{match[3]} {match[2]} {match[1]}" if match and match[1] != match[3] else None
