"""Genotypes: what a search finds, as plain data.

A cell has two inputs, c_{k−2} and c_{k−1}, called 0 and 1, and nodes 2, 3, …; a node is the sum of its edges, an
operation of an earlier input or node each; the cell's output is the concatenation of its nodes. Two rules say which
edges a node may have:

- ``"hb"``, the heavy-ball rule (23): two from the node before it and one from the one before that;
- ``"agd"``, also DARTS's: two from any earlier ones (a search derives different ones, a random sample need not).

Files are JSON. Nothing that is read is evaluated or unpickled, and everything is checked. This module needs only the
standard library: reading a genotype loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import short
from .._files import parse_json, printable, read_file, write_atomically

__all__ = ["CHOICES", "FOUND", "GENOTYPES", "CellGenotype", "Edge", "Genotype", "heavy_ball_sources", "load_genotype"]

VERSION = 1
LIMIT_BYTES = 1_000_000
LIMIT_NODES = 64
EDGES = {"hb": 3, "agd": 2}
# Genotypes that this package's own searches found, a file each.
FOUND = Path(__file__).with_name("genotypes")

# Table 6 without zero, which no derived network has (§9.3); a test holds it against operations.py.
CHOICES = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "neg_skip_connect",
)


class Edge(NamedTuple):
    """An operation and the input or node that it acts on."""

    operation: str
    source: int


Node = tuple[Edge, ...]
CellGenotype = tuple[Node, ...]


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell.

    Args:
        rule: ``"hb"`` or ``"agd"``.
        normal: the edges of each node of the normal cell; pairs are accepted for edges.
        reduction: likewise; edges from inputs have stride 2.

    Raises:
        ValueError: a field is not what it must be; the message names it, its value and what is allowed.
    """

    rule: str
    normal: CellGenotype
    reduction: CellGenotype

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or self.rule not in EDGES:
            raise ValueError(f"rule={short(self.rule)}: must be one of {', '.join(map(repr, EDGES))}")
        for name in ("normal", "reduction"):
            object.__setattr__(self, name, _checked_cell(name, getattr(self, name), self.rule))
        if len(self.normal) != len(self.reduction):
            raise ValueError(f"reduction has {len(self.reduction)} nodes: must have {len(self.normal)}, as normal has")

    @property
    def nodes(self) -> int:
        """Number of nodes of a cell."""
        return len(self.normal)

    # --- JSON ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the genotype as JSON with a version field, one node a line."""
        cells = []
        for name in ("normal", "reduction"):
            nodes = ",\n".join("    " + json.dumps(node) for node in getattr(self, name))
            cells.append(f'  "{name}": [\n{nodes}\n  ]')
        return f'{{\n  "version": {VERSION},\n  "rule": "{self.rule}",\n' + ",\n".join(cells) + "\n}\n"

    def to_dict(self) -> dict[str, Any]:
        """Return :meth:`to_json` as data: dicts, lists, strings and integers."""
        return json.loads(self.to_json())

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Read :meth:`to_json`'s text.

        Raises:
            ValueError: the text is no such JSON; the message names the field.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"genotype is not JSON: {error}") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genotype:
        """Read :meth:`to_dict`'s data.

        Raises:
            ValueError: it is no such data; the message names the field.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"genotype is a {type(data).__name__}: must be a JSON object")
        fields = {"version", "rule", "normal", "reduction"}
        if data.keys() != fields:
            wrong = sorted(short(key) for key in data.keys() ^ fields)
            raise ValueError(f"genotype has too many or too few fields ({', '.join(wrong)}): must be {sorted(fields)}")
        if type(data["version"]) is not int or data["version"] != VERSION:
            raise ValueError(f"version={short(data['version'])}: must be {VERSION}")
        return cls(data["rule"], data["normal"], data["reduction"])

    def save(self, path: str | Path) -> None:
        """Write the JSON file; a failure leaves an older file as it was.

        Raises:
            OSError: the file cannot be written.
        """
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Genotype:
        """Read a JSON file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is too large, or not a genotype; the message names the file and the field.
        """
        content = read_file(Path(path), LIMIT_BYTES)
        try:
            return cls.from_json(content.decode("utf-8"))
        except ValueError as error:  # a UnicodeDecodeError is one
            raise ValueError(f"{printable(path)}: {printable(error)}") from None

    # --- other people's forms -----------------------------------------------------------------------------------------

    def to_darts(self) -> dict[str, Any]:
        """Return DARTS's fields: flat ``normal`` and ``reduce`` lists of (operation, source), and both concatenations.

        Raises:
            ValueError: the rule is not ``"agd"``: DARTS's form has two edges a node.
        """
        if self.rule != "agd":
            raise ValueError(f"rule={self.rule!r}: must be 'agd', DARTS's form has two edges a node")
        concat = list(range(2, 2 + self.nodes))
        flat = {name: [tuple(edge) for node in cell for edge in node] for name, cell in self._cells()}
        return {**flat, "normal_concat": concat, "reduce_concat": concat}

    @classmethod
    def from_darts(
        cls,
        normal: Sequence[tuple[str, int]],
        normal_concat: Sequence[int],
        reduce: Sequence[tuple[str, int]],
        reduce_concat: Sequence[int],
    ) -> Genotype:
        """Read the fields of DARTS's named tuple, in its order: ``Genotype.from_darts(*DARTS_V2)``.

        Raises:
            ValueError: a list has an odd number of edges, or a cell does not concatenate all its nodes.
        """
        cells = []
        for name, edges, concat in (("normal", normal, normal_concat), ("reduce", reduce, reduce_concat)):
            if len(edges) % 2:
                raise ValueError(f"{name} has {len(edges)} edges: must have two a node")
            if list(concat) != list(range(2, 2 + len(edges) // 2)):
                raise ValueError(f"{name}_concat={short(list(concat))}: must be all nodes, 2 to {1 + len(edges) // 2}")
            cells.append(tuple(zip(edges[::2], edges[1::2])))
        return cls("agd", *cells)  # type: ignore[arg-type]

    def to_nni(self) -> dict[str, Any]:
        """Return the sample of NNI's spaces: ``{cell}/op_{node}_{k}``, for ``"agd"`` also ``{cell}/input_{node}_{k}``.

        Cells are called ``normal`` and ``reduce``, as in NNI's hub.
        """
        sample: dict[str, Any] = {}
        for name, cell in self._cells():
            for t, node in enumerate(cell, start=2):
                for k, edge in enumerate(node):
                    sample[f"{name}/op_{t}_{k}"] = edge.operation
                    if self.rule == "agd":
                        sample[f"{name}/input_{t}_{k}"] = [edge.source]
        return sample

    @classmethod
    def from_nni(cls, sample: Mapping[str, Any]) -> Genotype:
        """Read what a strategy of NNI's exports; the rule is ``"agd"`` if there are inputs to choose, else ``"hb"``.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        rule = "agd" if any("/input_" in key for key in sample) else "hb"
        nodes = 0
        while f"normal/op_{nodes + 2}_0" in sample:
            nodes += 1
        expected, cells = set(), []
        for name in ("normal", "reduce"):
            cell = []
            for t in range(2, 2 + nodes):
                node = []
                for k in range(EDGES[rule]):
                    keys = [f"{name}/op_{t}_{k}", *([f"{name}/input_{t}_{k}"] if rule == "agd" else [])]
                    expected.update(keys)
                    missing = [key for key in keys if key not in sample]
                    if missing:
                        raise ValueError(f"sample has no {missing[0]!r}: must name every edge of {nodes} nodes")
                    source = heavy_ball_sources(t)[k] if rule == "hb" else sample[keys[1]]
                    node.append(
                        (sample[keys[0]], source[0] if isinstance(source, list) and len(source) == 1 else source)
                    )
                cell.append(tuple(node))
            cells.append(tuple(cell))
        if sample.keys() - expected:
            raise ValueError(f"sample has {short(min(sample.keys() - expected))}: not an edge of {nodes} nodes")
        return cls(rule, *cells)  # type: ignore[arg-type]

    def _cells(self) -> list[tuple[str, CellGenotype]]:
        """Both cells by the names that DARTS and NNI give them."""
        return [("normal", self.normal), ("reduce", self.reduction)]


def load_genotype(genotype: Genotype | Mapping[str, Any] | str | Path) -> Genotype:
    """Return a genotype: itself, from its data, one that is published or in :data:`FOUND` by name, or a JSON file's.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no genotype.
        TypeError: the argument is none of these.
    """
    if isinstance(genotype, Genotype):
        return genotype
    if isinstance(genotype, Mapping):
        return Genotype.from_dict(genotype)
    if not isinstance(genotype, (str, Path)):
        raise TypeError(f"genotype={short(genotype)}: must be a Genotype, its to_dict(), a name or a path")
    if genotype in GENOTYPES:
        return GENOTYPES[str(genotype)]
    if genotype in found_names():
        return Genotype.load(FOUND / f"{genotype}.json")
    if not Path(genotype).is_file():
        names = ", ".join([*GENOTYPES, *found_names()])
        raise ValueError(f"genotype={str(genotype)!r}: must be a JSON file or one of {names}")
    return Genotype.load(genotype)


def found_names() -> list[str]:
    """Return the names of the genotypes in :data:`FOUND`."""
    return sorted(path.stem for path in FOUND.glob("*.json"))


def heavy_ball_sources(t: int) -> tuple[int, int, int]:
    """Return where the edges of node t come from under the heavy-ball rule (23)."""
    return t - 1, t - 1, t - 2


def _checked_cell(name: str, cell: object, rule: str) -> CellGenotype:
    if not isinstance(cell, (list, tuple)) or not 1 <= len(cell) <= LIMIT_NODES:
        raise ValueError(f"{name}={short(cell)}: must be a list of 1 to {LIMIT_NODES} nodes")
    return tuple(_checked_node(f"{name}[{i}]", node, i + 2, rule) for i, node in enumerate(cell))


def _checked_node(name: str, node: object, t: int, rule: str) -> Node:
    if not isinstance(node, (list, tuple)) or len(node) != EDGES[rule]:
        raise ValueError(f"{name}={short(node)}: must be a list of {EDGES[rule]} edges, as rule={rule!r} has")
    edges = tuple(_checked_edge(f"{name}[{k}]", edge, t) for k, edge in enumerate(node))
    sources = tuple(edge.source for edge in edges)
    if rule == "hb" and sources != heavy_ball_sources(t):
        raise ValueError(f"{name} has sources {sources}: must be {heavy_ball_sources(t)}, as rule='hb' has")
    return edges


def _checked_edge(name: str, edge: object, t: int) -> Edge:
    if not isinstance(edge, (list, tuple)) or len(edge) != 2:
        raise ValueError(f"{name}={short(edge)}: must be an operation and a source")
    operation, source = edge
    if not isinstance(operation, str) or operation not in CHOICES:
        raise ValueError(f"{name} has operation {short(operation)}: must be one of {', '.join(CHOICES)}")
    if type(source) is not int or not 0 <= source < t:
        raise ValueError(f"{name} has source {short(source)}: must be an integer from 0 to {t - 1}")
    return Edge(operation, source)


def _published(normal: str, reduction: str) -> Genotype:
    """Expand 's3 1' to ('sep_conv_3x3', 1); two edges a node."""
    names = {
        "s3": "sep_conv_3x3",
        "s5": "sep_conv_5x5",
        "d3": "dil_conv_3x3",
        "d5": "dil_conv_5x5",
        "max": "max_pool_3x3",
        "avg": "avg_pool_3x3",
        "skip": "skip_connect",
    }
    cells = []
    for text in (normal, reduction):
        words = text.split()
        edges = [Edge(names[word], int(source)) for word, source in zip(words[::2], words[1::2])]
        cells.append(tuple(zip(edges[::2], edges[1::2])))
    return Genotype("agd", *cells)


# Liu et al. 2019 (first and second order), Xu et al. 2020 and Chen et al. 2019.
GENOTYPES = {
    "darts_v1": _published(
        "s3 1 s3 0  skip 0 s3 1  skip 0 s3 1  s3 0 skip 2",
        "max 0 max 1  skip 2 max 0  max 0 skip 2  skip 2 avg 0",
    ),
    "darts_v2": _published(
        "s3 0 s3 1  s3 0 s3 1  s3 1 skip 0  skip 0 d3 2",
        "max 0 max 1  skip 2 max 1  max 0 skip 2  skip 2 max 1",
    ),
    "pc_darts_cifar": _published(
        "s3 1 skip 0  s3 0 d3 1  s5 0 s3 1  avg 0 d3 1",
        "s5 1 max 0  s5 1 s5 2  s3 0 s3 3  s3 1 s3 2",
    ),
    "pc_darts_image": _published(
        "skip 1 s3 0  s3 0 skip 1  s3 1 s3 3  s3 1 d5 4",
        "s3 0 skip 1  d5 2 max 1  s3 2 s3 1  s5 0 s3 3",
    ),
    "p_darts": _published(
        "skip 0 d3 1  skip 0 s3 1  s3 1 s3 3  s3 0 d5 4",
        "avg 0 s5 1  s3 0 d5 2  max 0 d3 1  d3 1 d5 3",
    ),
}
