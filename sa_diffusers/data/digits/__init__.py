"""The small world of the bundled pipeline: MNIST digits with an ink, a background and a stroke, and captions."""

from sa_diffusers.data.digits.captions import ATTRIBUTES, WORDS, caption, fill, held_out_templates, random_attributes
from sa_diffusers.data.digits.images import ColoredDigits, colorize, load_strokes


__all__ = [
    "ATTRIBUTES",
    "WORDS",
    "ColoredDigits",
    "caption",
    "colorize",
    "fill",
    "held_out_templates",
    "load_strokes",
    "random_attributes",
]
