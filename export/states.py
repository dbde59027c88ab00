"""Names and shapes of the states at the graph's edge, as ONNX Runtime GenAI binds them."""

from __future__ import annotations

from dataclasses import dataclass

from export.config import SambaYConfig


@dataclass(frozen=True)
class State:
    """One tensor that a session carries.

    Attributes:
        shape: sizes, or the name of a symbolic dimension: batch, window, capacity.
    """

    past: str
    present: str
    shape: tuple[int | str, ...]


def layer_states(config: SambaYConfig, layer: int) -> tuple[State, State]:
    """The two states of one of the layers 0 .. M+1, in the order the model takes them."""
    if config.layer_kind(layer) == "mamba":
        shapes: dict[str, tuple[int | str, ...]] = {
            "conv_state": ("batch", config.d_inner, config.d_conv - 1),
            "recurrent_state": ("batch", config.d_inner, config.d_state),
        }
    else:
        slots = "capacity" if layer == config.shared_layer else "window"
        shape = ("batch", config.num_key_value_heads, slots, config.head_size)
        shapes = {"key": shape, "value": shape}
    first, second = (
        State(f"past_key_values.{layer}.{name}", f"present.{layer}.{name}", shape)
        for name, shape in shapes.items()
    )
    return first, second


def all_states(config: SambaYConfig) -> tuple[State, ...]:
    """Every state in the order of the graph's inputs."""
    return tuple(
        state for layer in range(config.shared_layer + 1) for state in layer_states(config, layer)
    )
