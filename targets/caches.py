"""What keys and values are stored in: the choice of ``--cache``."""

from __future__ import annotations

import dataclasses

from graph_passes.pipeline import Pass
from graph_passes.quantize_caches import quantize_caches
from graph_passes.store_caches_in_float16 import store_caches_in_float16
from targets.target import CPU, CUDA, Target

# The pass that makes them so; the graph as traced has float32.
CACHES: dict[str, tuple[Pass, ...]] = {
    "float32": (),
    "float16": (store_caches_in_float16,),
    "int8": (quantize_caches,),
}


def with_cache(target: Target, cache: str) -> Target:
    """The target with caches of another element type.

    Raises:
        ValueError: there is no such type, or the target's provider has no operators for it.
    """
    if cache not in CACHES:
        raise ValueError(f"unknown cache type {cache!r}: expected one of {', '.join(CACHES)}")
    if cache == "int8" and target.provider not in (CPU, CUDA):
        raise ValueError(
            f"caches of int8 have operators on the CPU and on CUDA devices only, and {target.name} "
            f"is for {target.provider}: choose {target.cache}, its own, or a cpu or cuda target"
        )
    passes = [apply for apply in target.passes if (apply,) not in CACHES.values()]
    return dataclasses.replace(target, cache=cache, passes=(*CACHES[cache], *passes))
