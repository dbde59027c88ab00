"""Stock ONNX Runtime GenAI runs a package of several graphs as a pipeline of decoders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime_py import Session

og = pytest.importorskip(
    "onnxruntime_genai", reason="install it: .venv/bin/pip install -e '.[genai]'"
)

pytestmark = pytest.mark.genai

CPU = "CPUExecutionProvider"


class Package:
    """In both runtimes, all graphs on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.model = og.Model(str(folder))
        self.ours = Session(folder, providers=[CPU], threads=1)

    def generator(self) -> "og.Generator":
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=500)
        return og.Generator(self.model, parameters)


@pytest.fixture(scope="module")
def package(export, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("pipeline") / "package"
    shutil.copytree(export(None, "qnn-npu-w4a16"), folder)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    stages = {k: v for each in config["model"]["decoder"]["pipeline"] for k, v in each.items()}
    options = [{"qnn": {"backend_type": "htp"}}]
    for name in ("prefill", "decode"):
        assert stages[name]["session_options"]["provider_options"] == options
        stages[name]["session_options"]["provider_options"] = []
    path.write_text(json.dumps(config), encoding="utf-8")
    return Package(folder)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_greedy_tokens_are_those_of_our_runtime(package: Package, length: int) -> None:
    """Prompts shorter and longer than a call; states bounded but for the shared cache."""
    ids = np.random.default_rng(length).integers(0, 256, length)
    generator, sequence = package.generator(), package.ours.start()
    generator.append_tokens(ids.astype(np.int32))
    logits = sequence.step(ids)[0]
    compared = 0  # token_count() counts the padding of the prompt's last call, too
    while compared < 40 and not generator.is_done():
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        assert token == logits.argmax()
        logits = sequence.step([token])[0]
        compared += 1
    assert compared > 1


def test_a_rewind_is_refused(package: Package) -> None:
    generator = package.generator()
    generator.append_tokens(np.arange(1, 20, dtype=np.int32))
    generator.generate_next_token()
    with pytest.raises(RuntimeError, match="not supported for decoder-pipeline"):
        generator.rewind_to(0)


@pytest.mark.parametrize("later", [1, 7, 64, 100])
@pytest.mark.parametrize("generated", [0, 3])
def test_a_later_prompt_is_refused_and_not_read_wrongly(
    package: Package, generated: int, later: int
) -> None:
    """GenAI adds one token to its mask, whatever their number; the positions it gives tell."""
    generator = package.generator()
    generator.append_tokens(np.arange(1, 20, dtype=np.int32))
    for _ in range(generated):
        generator.generate_next_token()
    with pytest.raises(RuntimeError, match=r"input: position_ids .*\n.*Got: 1 Expected: 64"):
        generator.append_tokens(np.arange(1, 1 + later, dtype=np.int32))


def test_a_conversation_goes_on_with_a_new_generator(package: Package) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 90).astype(np.int32)
    first = package.generator()
    first.append_tokens(ids[:40])
    again = package.generator()
    again.append_tokens(ids)
    expected = package.ours.start().step(ids)
    np.testing.assert_allclose(again.get_logits()[0], expected, atol=0.15)  # cut elsewhere, float16
