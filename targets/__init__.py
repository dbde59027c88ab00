"""What a package can be made for: one ``Target`` a recipe, joined here."""

from __future__ import annotations

from difflib import get_close_matches

from targets import cpu, cuda, directml, openvino, qnn, webgpu
from targets.target import Target

TARGETS: tuple[Target, ...] = (
    *cpu.TARGETS,
    *cuda.TARGETS,
    *directml.TARGETS,
    *openvino.TARGETS,
    *qnn.TARGETS,
    *webgpu.TARGETS,
)
DEFAULT = cpu.INT4


def find_target(name: str) -> Target:
    """The target of a name; "auto" is the one for what the installed ONNX Runtime has.

    Raises:
        ValueError: there is none; the message offers the nearest names, or all.
    """
    if name == "auto":
        from targets.choose import choose_target  # needs the runtime, which listing does not

        return choose_target()
    by_name = {target.name: target for target in TARGETS}
    if name not in by_name:
        offered = get_close_matches(name, by_name, cutoff=0.4) or list(by_name)
        raise ValueError(f"unknown target {name!r}: did you mean {' or '.join(offered)}?")
    return by_name[name]
