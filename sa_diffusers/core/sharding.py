"""Tensors in parts: what this process holds of a parameter that FSDP2 has spread over the processes, and the way back.

A parameter that is not spread is its own and only part, so none of these functions needs to be told which it is.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def local_part(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that lies where this process's part of `parameter` does; a view, nothing is sent.

    Raises:
        ValueError: parts of another form than FSDP2's.
    """
    if not isinstance(parameter, DTensor):
        return whole
    part, mesh = whole, parameter.device_mesh
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard():
            pieces, rank = part.chunk(mesh.size(dimension), placement.dim), mesh.get_local_rank(dimension)
            # There are fewer pieces than processes where the tensor is shorter than these are many.
            part = pieces[rank] if rank < len(pieces) else part.narrow(placement.dim, 0, 0)
    if part.shape != local_part(parameter).shape:
        raise ValueError(
            f"expected a parameter in FSDP2's parts, got {parameter.placements} of {tuple(parameter.shape)} with "
            f"{tuple(local_part(parameter).shape)} here; shard over data-parallel processes only"
        )
    return part


def whole_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole tensor from parts that lie as those of `parameter` do; every process must call, and gets it."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    spread = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return spread.full_tensor()


def sum_over_parts(value: Tensor, parameter: Tensor) -> Tensor:
    """The sum of what the processes computed, each from its part of parameters like this one; every one must call."""
    if not isinstance(parameter, DTensor):
        return value
    # Only over what is cut: under hybrid sharding the same part lies in several processes, and counts once.
    placements = [Partial() if placement.is_shard() else placement for placement in parameter.placements]
    return DTensor.from_local(value, parameter.device_mesh, placements, run_check=False).full_tensor()
