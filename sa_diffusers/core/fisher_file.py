"""A diagonal Fisher as one safetensors file, with how it was made in its header; in float16 half as large.

Squared gradients spread over many powers of ten, most of them below what float16 can hold. So a float16 file holds
each tensor times a power of two that brings its largest value to between 2^14 and 2^15; the exponents stand in the
header. Values down to 4e-9 of the tensor's largest then keep a relative error of at most 2^-11, smaller ones an
absolute one of 2e-12 of the largest, and only those below that become 0.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sa_diffusers.core.safetensors_header import sort_metadata


FORMAT = "sa_diffusers-fisher-1"
SCALED_FORMAT = "sa_diffusers-fisher-2"  # a reader of the first alone must refuse it rather than miss the exponents
LARGEST_EXPONENT = 15  # of what a scaled tensor holds; 16 could round up to float16's infinity


class FisherMismatch(ValueError):
    """A Fisher belongs to another model or has another unit."""


@dataclass
class Fisher:
    """Diagonal Fisher values by parameter name, and how they were made.

    Attributes:
        tensors: float32, >= 0, one value a weight, in the parameters' shapes.
        metadata: what they belong to: model_hash, reduction, num_terms (T), prediction_type, and for people model,
            revision; how they were made: estimator, terms ("all" or K of each draw), num_samples, samples (fingerprint
            of the set), num_evaluations (gradients of one sample at one timestep), scale (c over all weights), seed,
            total_relative_error (standard error of the sum over all weights; it says nothing of a single weight),
            num_noisy_tensors (whose values cannot be told from noise, and may be too high), version (of this package),
            dtype (the precision that the values went through). Files of older versions
            lack some of them.
    """

    tensors: dict[str, Tensor]
    metadata: dict

    def save(self, path: str | Path, dtype: Literal["float32", "float16"] = "float32") -> None:
        """Write one safetensors file; "float16" takes half the room and rounds (see this module's docstring)."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        if dtype == "float32":
            header = {"format": FORMAT, "fisher": json.dumps(self.metadata)}
        elif dtype == "float16":
            scaled = {name: _to_float16(tensor) for name, tensor in tensors.items()}
            tensors = {name: values for name, (values, _) in scaled.items()}
            exponents = json.dumps({name: exponent for name, (_, exponent) in scaled.items()})
            fisher = json.dumps(self.metadata | {"dtype": dtype})
            header = {"format": SCALED_FORMAT, "fisher": fisher, "exponents": exponents}
        else:
            raise ValueError(f"expected the dtype of a Fisher's file to be float32 or float16, got {dtype!r}")
        save_file(tensors, path, metadata=header)
        sort_metadata(path)

    @classmethod
    def load(cls, path: str | Path) -> "Fisher":
        """Read a file written by `save`, in float32. Raises FileNotFoundError; FisherMismatch: it holds no Fisher."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no Fisher at {path}; expected a .safetensors file such as <run>/fisher.safetensors"
            )
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") not in (FORMAT, SCALED_FORMAT):
                    raise FisherMismatch(f"{path} is no Fisher of this format; its header says {header.get('format')}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
            for name, exponent in json.loads(header.get("exponents", "{}")).items():
                tensors[name] = (tensors[name].double() * 2.0**-exponent).float()
            return cls(tensors, dict(json.loads(header["fisher"])))
        except FisherMismatch:
            raise
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FisherMismatch(f"{path} is no readable Fisher: {type(error).__name__}: {error}") from error

    def check(self, **expected: object) -> None:
        """Raise FisherMismatch, naming every field of the metadata that is not as expected (model_hash, ...)."""
        differing = [
            f"{key}: the Fisher has {self.metadata.get(key)!r}, this run {value!r}"
            for key, value in expected.items()
            if self.metadata.get(key) != value
        ]
        if differing:
            model, revision = self.metadata.get("model"), self.metadata.get("revision")
            origin = f", made of {model}" + (f" at {revision}," if revision else ",") if model else ""
            raise FisherMismatch(
                f"the Fisher{origin} belongs to another model or unit ({'; '.join(differing)}); omit --fisher to "
                "estimate it, or pass the one of this model"
            )


def _to_float16(tensor: Tensor) -> tuple[Tensor, int]:
    """The values times 2**exponent in float16, and the exponent; of a tensor of zeros 0."""
    largest = tensor.max().item() if tensor.numel() else 0.0
    exponent = LARGEST_EXPONENT - math.frexp(largest)[1] if largest > 0 else 0
    # In float64, since 2**exponent alone may be beyond float32.
    return (tensor.double() * 2.0**exponent).to(torch.float16), exponent
