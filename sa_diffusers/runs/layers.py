"""Options of several sources, such as files and a command line: what a later one unsays of those before it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sa_diffusers import methods
from sa_diffusers.runs.work_options import ROBUST


Layer = Mapping[str, Any]


def consistent(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """The layers without what their method settles where a later one is chosen, or what that settles before it.

    And without concepts where a later one names others, by themselves or in a list; and without what `robust` has
    settled where it is false at last, as over the configuration of a run.
    """
    layers = [_still_named(layer, layers[position + 1 :]) for position, layer in enumerate(layers)]
    if not next((layer["robust"] for layer in reversed(layers) if "robust" in layer), True):
        layers = [_not_robust(layer) for layer in layers]
    chosen = [position for position, layer in enumerate(layers) if layer.get("method")]
    if not chosen:
        return layers
    last, found, current = layers[chosen[-1]]["method"], [], None
    for position, layer in enumerate(layers):
        current = layer.get("method") or current
        settled = set(methods.get(last).fixes) if position < chosen[-1] else set()
        if current not in (None, last):
            settled |= methods.get(current).fixes.keys()
        found.append({name: value for name, value in layer.items() if name not in settled})
    return found


def _still_named(layer: Layer, later: Sequence[Layer]) -> dict[str, Any]:
    replaced = {"concepts"} if any(one.get("concept") for one in later) else set()
    if any(one.get("concepts") for one in later):
        replaced |= {"concept", "surrogate", "siblings"}
    return {name: value for name, value in layer.items() if name not in replaced}


def _not_robust(layer: Layer) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if not layer.get("robust") or ROBUST.get(name) != value}
