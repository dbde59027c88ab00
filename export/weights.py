"""A checkpoint's weights in the torch model: as numbers, or as names, shapes and dtypes only."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.checkpoint import Checkpoint, StoredTensor
from export.model import Layer, SambaY

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_weights(checkpoint: Checkpoint) -> SambaY:
    """The model with its weights in memory, float32: for tests, verification and training."""
    with torch.device("meta"):
        model = SambaY(checkpoint.config, tied_head=checkpoint.tied_head)
    for name, tensor in checkpoint.tensors.items():
        _set_parameter(model, name, read_weight(tensor))
    return model


def load_layer(checkpoint: Checkpoint, index: int) -> Layer:
    """One layer with its weights in memory, float32."""
    with torch.device("meta"):
        layer = Layer(checkpoint.config, index)
    prefix = f"model.layers.{index}."
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(prefix):
            _set_parameter(layer, name.removeprefix(prefix), read_weight(tensor))
    return layer.eval().requires_grad_(False)


def read_weight(tensor: StoredTensor) -> torch.Tensor:
    """A stored tensor, or some rows of one, as float32."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        data = bytearray(file.read(tensor.nbytes))
    return torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape).float()


def fake_weights(checkpoint: Checkpoint, mode: FakeTensorMode) -> SambaY:
    """The model with parameters of the stored shapes and dtypes that take no memory."""
    with mode:
        model = SambaY(checkpoint.config, tied_head=checkpoint.tied_head)
        for name, tensor in checkpoint.tensors.items():
            dtype = TORCH_DTYPES[tensor.dtype]
            _set_parameter(model, name, torch.empty(tensor.shape, dtype=dtype))
    return model.eval().requires_grad_(False)


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
