"""Which weights are stored how: a recipe is data, and can be read from a file.

    {"default": {"bits": 4, "block_size": 32},
     "embedding": {"bits": 8, "block_size": 32},
     "rules": {"*.x_proj.*": null, "*.layers.{memory_layer}.attn.*": {"bits": 8}},
     "equalize": false}

A pattern is one of ``fnmatch`` on the names of weights and may hold ``{memory_layer}`` and
``{shared_layer}``, the numbers of these layers; the first that matches decides; null leaves a
weight as it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import onnx_ir as ir

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
SCALE_TYPES = ("float32", "float16")

# Round to nearest; the scale of least squared error; the same with the errors of earlier columns
# made up for by later ones, as the layer's inputs on calibration text tell (GPTQ).
QUANTIZERS = ("rtn", "search", "gptq")


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a matrix is stored.

    Attributes:
        bits: 4 or 8.
        block_size: neighbours in a row that share a scale; 16, 32, 64, 128 or 256.
        zero_points: each block has the value of zero of its own, else it is the middle one.
        quantizer: how scales and values are found; one of ``QUANTIZERS``.
        scale_type: "float32", or "float16": a tenth smaller at 4 bits in blocks of 32, and what our
            own product reads as it is; others make float32 of it while loading.

    Raises:
        ValueError: a setting that is not offered; the message names it.
    """

    bits: int = 4
    block_size: int = 32
    zero_points: bool = False
    quantizer: str = "search"
    scale_type: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what no runtime reads."""
        offers = {
            "bits": BITS,
            "block_size": BLOCK_SIZES,
            "quantizer": QUANTIZERS,
            "scale_type": SCALE_TYPES,
        }
        for name, offered in offers.items():
            found = getattr(self, name)
            if found not in offered:
                raise ValueError(f"{name} is {found!r}, expected one of {offered}")

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a matrix of this size."""
        blocks = -(-columns // self.block_size)
        zero_points = -(-blocks * self.bits // 8) if self.zero_points else 0
        scale = 2 if self.scale_type == "float16" else 4
        return rows * (blocks * (self.block_size * self.bits // 8 + scale) + zero_points)


# What a rule says: a format, the default's with other bits, or "leave it as it is".
Storage = WeightFormat | int | None
Rule = tuple[str, Storage]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every weight is stored.

    Attributes:
        default: of the linear layers that no rule names.
        embedding: of the embedding and the head tied to it; None leaves them as they are.
        rules: patterns in order, the first that matches decides.
        equalize: even out the inputs of linear layers before, see ``graph_passes.equalize``; None
            does so where anything is quantized by what layers are fed.

    Raises:
        ValueError: the embedding's quantizer is "gptq".
    """

    default: WeightFormat = WeightFormat()
    embedding: WeightFormat | None = WeightFormat(bits=8)
    rules: tuple[Rule, ...] = ()
    equalize: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what would fail after a long calibration."""
        if self.embedding is not None and self.embedding.quantizer == "gptq":
            raise ValueError(
                "quantizer of 'embedding' is 'gptq', which makes up for errors in a sum over "
                "inputs, and an embedding is looked up: take 'search'"
            )

    @property
    def calibrated(self) -> bool:
        """Whether anything depends on what layers are fed on a text."""
        formats = [self.default, *(storage for _, storage in self.rules)]
        return bool(self.equalize) or any(
            isinstance(each, WeightFormat) and each.quantizer == "gptq" for each in formats
        )

    @property
    def equalized(self) -> bool:
        """Whether inputs of linear layers are evened out."""
        return self.calibrated if self.equalize is None else self.equalize

    def format_of(self, name: str, layers: int) -> WeightFormat | None:
        """The format of a linear layer's weight in a model of so many layers; None leaves it."""
        return _first_match(name, self.default, _filled_in(self.rules, layers // 2))

    def with_quantizer(self, quantizer: str) -> Recipe:
        """The same bits and blocks found by another quantizer.

        Raises:
            ValueError: there is no such quantizer.
        """

        def changed(storage: Storage) -> Storage:
            if not isinstance(storage, WeightFormat):
                return storage
            return dataclasses.replace(storage, quantizer=quantizer)

        embedding = self.embedding
        return Recipe(
            default=dataclasses.replace(self.default, quantizer=quantizer),
            embedding=embedding
            and dataclasses.replace(embedding, quantizer=_of_embedding(quantizer)),
            rules=tuple((pattern, changed(storage)) for pattern, storage in self.rules),
            equalize=self.equalize,
        )

    def to_json(self) -> dict[str, Any]:
        """What ``recipe_from_json`` reads."""
        rules = {pattern: _described(self.default, storage) for pattern, storage in self.rules}
        return {
            "default": dataclasses.asdict(self.default),
            "embedding": self.embedding and dataclasses.asdict(self.embedding),
            "rules": rules,
            "equalize": self.equalize,
        }


def recipe_from_json(contents: Mapping[str, Any], scale_type: str = "float32") -> Recipe:
    """Read a recipe; what a format leaves out is as in the default.

    Args:
        scale_type: of every format that does not say.

    Raises:
        ValueError: an unknown key, or a setting that is not offered; the message names it.
    """
    if not isinstance(contents, Mapping):
        raise ValueError(f"a recipe is {type(contents).__name__}, expected an object")
    _check_keys("a recipe", contents, ("default", "embedding", "rules", "equalize"))
    basis = WeightFormat(scale_type=scale_type)
    default = _format("default", contents.get("default", {}), basis)
    quantizer = _of_embedding(default.quantizer)
    basis = dataclasses.replace(default, bits=8, zero_points=False, quantizer=quantizer)
    embedding = contents.get("embedding", {})
    if embedding is not None:
        embedding = _format("embedding", embedding, basis)
    rules = contents.get("rules", {})
    if not isinstance(rules, Mapping):
        raise ValueError(f"'rules' is {type(rules).__name__}, expected an object of patterns")
    equalize = contents.get("equalize")
    if equalize is not None and not isinstance(equalize, bool):
        raise ValueError(f"'equalize' is {equalize!r}, expected true or false")
    return Recipe(
        default=default,
        embedding=embedding,
        rules=tuple(
            (pattern, None if storage is None else _format(pattern, storage, default))
            for pattern, storage in rules.items()
        ),
        equalize=equalize,
    )


def choose_formats(
    model: ir.Model, names: Iterable[str], default: WeightFormat, rules: Iterable[Rule]
) -> dict[str, WeightFormat | None]:
    """The format of every named weight; None where a rule leaves it as it is.

    Args:
        model: whose metadata say which layers ``{memory_layer}`` and ``{shared_layer}`` are.

    Raises:
        ValueError: a rule that matches no name; the message offers near ones.
    """
    names = list(names)
    filled = _fill_in_layers(model, list(rules))
    for pattern, _ in filled:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.2)
            raise ValueError(
                f"no weight of a linear layer matches {pattern!r}: correct the rule or remove it; "
                f"there are {', '.join(near or names[:3])} and others"
            )
    return {name: _first_match(name, default, filled) for name in names}


def resolve(default: WeightFormat, storage: Storage) -> WeightFormat | None:
    """The format a rule means."""
    if isinstance(storage, int):
        return dataclasses.replace(default, bits=storage)
    return storage


def _first_match(name: str, default: WeightFormat, rules: Iterable[Rule]) -> WeightFormat | None:
    matching = (storage for pattern, storage in rules if fnmatchcase(name, pattern))
    return resolve(default, next(matching, default))


def _of_embedding(quantizer: str) -> str:
    """It is looked up, not multiplied by: calibration says nothing of its inputs."""
    return "search" if quantizer == "gptq" else quantizer


def _described(default: WeightFormat, storage: Storage) -> dict[str, Any] | None:
    chosen = resolve(default, storage)
    return None if chosen is None else dataclasses.asdict(chosen)


def _format(name: str, contents: Any, basis: WeightFormat) -> WeightFormat:
    if not isinstance(contents, Mapping):
        raise ValueError(f"format of {name!r} is {contents!r}, expected an object such as {{}}")
    _check_keys(f"format of {name!r}", contents, [f.name for f in dataclasses.fields(basis)])
    try:
        return dataclasses.replace(basis, **contents)
    except ValueError as error:
        raise ValueError(f"format of {name!r}: {error}") from error


def _check_keys(where: str, contents: Mapping[str, Any], known: Iterable[str]) -> None:
    if unknown := sorted(set(contents) - set(known)):
        raise ValueError(f"{where} has unknown keys {unknown}, expected {sorted(known)}")


def _fill_in_layers(model: ir.Model, rules: list[Rule]) -> list[Rule]:
    if not any("{" in pattern for pattern, _ in rules):
        return rules
    if "sambay.config" not in model.metadata_props:
        raise ValueError(
            "a rule names a layer by its role, but the model has no metadata 'sambay.config' "
            "that says which layer that is"
        )
    memory = json.loads(model.metadata_props["sambay.config"])["num_hidden_layers"] // 2
    return _filled_in(rules, memory)


def _filled_in(rules: Iterable[Rule], memory: int) -> list[Rule]:
    layers = {"{memory_layer}": str(memory), "{shared_layer}": str(memory + 1)}
    filled = []
    for pattern, storage in rules:
        for role, layer in layers.items():
            pattern = pattern.replace(role, layer)
        filled.append((pattern, storage))
    return filled
