"""The targets as a page: ``python -m targets.describe > docs/targets.md``."""

from __future__ import annotations

import argparse
import json
import sys

from graph_passes.pipeline import describe_pass
from targets import DEFAULT, TARGETS
from targets.graphs import file_of
from targets.target import Graph, Target

_HEAD = """\
# Targets

Made by `python -m targets.describe > docs/targets.md`; a test holds this page to the code.

`phi4export --target NAME` writes a package for one provider of ONNX Runtime, and `--target auto`
the 4-bit one for what the installed ONNX Runtime has. All come from one traced graph and differ
by their passes. `python -m targets.lint PACKAGE` says by name which nodes the package's provider
has no kernel for; it finds none in the packages of these recipes.

| target | provider | caches | what it is |
|---|---|---|---|
"""

_NOTES = """
## What was run, and what was not

Every package runs on the CPU provider in the tests, float16 ones too, and gives the logits of the
float32 graph of the same weights (float16: within 0.15 of logits that spread by 3), one token or
several windows a call. `openvino-int4` also runs on OpenVINO's CPU device. GenAI runs them on the
CPU, prompts cut. CUDA, DirectML and WebGPU packages were held to the tables of these providers'
kernels ([targets/kernels.json](../targets/kernels.json) names their sources). `webgpu-int4` also
runs on ONNX Runtime's native WebGPU provider, on a Vulkan driver in software.

At the published size, with random weights, each was exported, looked at node by node, and run on
the CPU provider for a prompt of 10 tokens and three more; bodies are inlined, none lacks a kernel:

| target | package | nodes | memory of the export | of a session on the CPU provider |
|---|---|---|---|---|
| `cuda-int4` | 2.54 GB | 3707 | 1.97 GB, 148 s of processor time | 5.3 GB |
| `openvino-int4` | 2.75 GB | 3345 | 1.62 GB, 143 s of processor time | 5.2 GB |
| `directml-int4` | 2.55 GB | 3549 | 1.98 GB, 152 s of processor time | 5.3 GB |
| `webgpu-int4` | 2.55 GB | 3724 | 2.00 GB, 142 s of processor time | 5.3 GB |
| `directml-fp16` | 7.71 GB | 3548 | 1.60 GB, 92 s of processor time | 18.0 GB |
| `cuda-fp16` | 7.71 GB | 3710 | 1.56 GB, 89 s of processor time | 18.1 GB |
| `qnn-npu-w4a16`, uint16 | 2.71 GB | 4991 | 2.73 GB, 322 s of processor time | 5.1 GB |

By `python -m benchmarks.targets DIR --folder PACKAGES`; machine, versions and date are in
[targets.json](../benchmarks/results/targets.json), the last row with `--activations uint16`, five
graphs. The CPU provider makes float32 of float16, hence the 18 GB. `qnn-npu-w4a16` with float16 was
measured apart: [2.60 GB](engines.md#qnn).

- A package opened by `runtime_py` without naming a provider uses the one it was made for, or says
  what that is.
- Where metadata `sambay.max_tokens` stands, the scan's body has no loop and takes that many
  tokens a call; a longer call fails. `runtime_py` keeps to it. `genai_config.json` tells GenAI,
  which cuts prompts (`chunk_size`).
- DirectML compiles a graph for every shape it meets. Feed one row, calls of 1 and of
  `sambay.max_tokens` tokens, and caches of a few sizes; tell the session with
  `AddFreeDimensionOverrideByName` ("tokens", "total", "window", "capacity").
- CUDA: every node has a kernel on the device, no shape depends on a value and nothing crosses
  between processor and device in mid-graph, as [capturing a CUDA graph](engines.md#cuda) needs;
  `python -m targets.lint PACKAGE` tells. `enable_cuda_graph` is "0" until it was tried on a device.
  `ep.cuda.fpa_intb_gemm` turns the fast 4-bit kernels on.
- `qnn-npu-*` packages hold five graphs that share one file of weights. Layers 0..M and the keys and
  values of layer M+1 run on the NPU, prompts in calls of 64 tokens, all in float16: the processor
  has nothing wider; `--activations uint16` makes linear layers and gates
  [integers](quantization.md#integer-activations). Embedding and masks before it, attention over the
  growing cache and what follows run on the CPU: of these only the last token of a call is seen, and
  one token at a time is bound by reading weights on either processor. One row; no `--verify`, no
  `--all-logits`. On QNN's emulator free-running answers stayed within what 8-bit weights may cost
  (mean KL divergence 0.002, 99 % of tokens kept). Not run on a device. Compile on the device, once:
  `python -m runtime_py.compile PACKAGE`.
- WebGPU: integers (positions, masks, slots) are computed on the processor beside the device,
  everything else on it.
"""


def page() -> str:
    """The page, in Markdown."""
    rows = "".join(f"| {_name(each)} | {_short(each)} |\n" for each in TARGETS)
    return _HEAD + rows + _NOTES + "\n## Recipes\n" + "".join(map(_recipe, TARGETS))


def _name(target: Target) -> str:
    return f"`{target.name}`" + (" (default)" if target is DEFAULT else "")


def _short(target: Target) -> str:
    provider = target.provider.removesuffix("ExecutionProvider")
    return f"{provider} | {target.cache} | {target.summary}"


def _recipe(target: Target) -> str:
    passes = "".join(f"    {describe_pass(apply)}\n" for apply in target.passes)
    limit = f"At most {target.max_context} tokens in GenAI. " if target.max_context else ""
    options = json.dumps(dict(target.session_options))
    graphs = "".join(map(_graph, target.graphs))
    told = f"{limit}GenAI session options: `{options}`.\n{_integers(target)}"
    return f"\n### {target.name}\n\n{passes}{graphs}\n{told}"


def _integers(target: Target) -> str:
    found = target.integers
    if found is None:
        return ""
    return (
        f"\n`--activations uint16` computes {', '.join(found.operators)} of what is "
        f"`{found.part}` in integers. Floats there: {', '.join(found.islands)}, and what reads "
        f"{', '.join(found.wide)}.\n"
    )


def _graph(graph: Graph) -> str:
    calls = f", calls of {graph.tokens}" if graph.tokens else ""
    passes = "".join(f"    {describe_pass(apply)}\n" for apply in graph.passes)
    return f"\nThen `{file_of(graph)}` ({graph.provider}{calls}):\n\n{passes}"


def main() -> int:
    """Print the page."""
    argparse.ArgumentParser(prog="python -m targets.describe", description=__doc__).parse_args()
    sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
