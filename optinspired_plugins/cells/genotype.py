"""Genotypes: cells as plain data, the result of a search.

A cell has the inputs 0 (c_{k−2}) and 1 (c_{k−1}) and the nodes 2, 3, …. A node is the sum of its edges; an edge is an
operation on an earlier input or node. The output of the cell is the concatenation of its nodes (22). Two rules for the
edges of node t are the paper's:

- ``"hb"``, the heavy-ball rule (23): two edges from t − 1 and one from t − 2;
- ``"agd"``, (27)-(28): two edges from any earlier inputs or nodes, as in DARTS. A search derives two different sources.

Any other rule is the name of an algorithm, which nothing is done with: a node then has one or more edges from any
earlier inputs or nodes. Files of the paper's rules have version 1, and the others version 2, in the same form.

Files are JSON. Reading evaluates and unpickles nothing, and checks every field. This module imports only the standard
library, so that reading a genotype does not load torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, cast

from .._checks import short
from .._files import parse_json, printable, read_file, write_atomically
from .labels import KINDS, Label, slot_labels

__all__ = [
    "CHOICES",
    "EDGES",
    "GENOTYPES",
    "REGISTER",
    "SKIPS",
    "CellGenotype",
    "Edge",
    "Genotype",
    "genotype_names",
    "heavy_ball_sources",
    "load_genotype",
]

VERSIONS = (1, 2)
LIMIT_BYTES = 1_000_000
LIMIT_NODES = 64
LIMIT_EDGES = 2 * (LIMIT_NODES + 1)
RULE = re.compile(r"[^\W\d][\w.:-]{0,99}")
EDGES = {"hb": 3, "agd": 2}
# Published genotypes and results of this project's own searches, one file each.
FOLDER = resources.files(__package__) / "genotypes"

# Table 6 without zero, which no derived network has (§9.3), and then the registered operations; a test compares it with
# operations.py.
CHOICES = [
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "neg_skip_connect",
]
REGISTER = "or registered before by register_operation, on the command line in a module after --import"
SKIPS = ("skip_connect", "neg_skip_connect")


class Edge(NamedTuple):
    """An operation and its input or node."""

    operation: str
    source: int


Node = tuple[Edge, ...]
CellGenotype = tuple[Node, ...]


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell.

    Args:
        rule: ``"hb"``, ``"agd"`` or the name of another algorithm: a letter, and letters, digits and ``_.:-``.
        normal: the edges of each node of the normal cell, as :class:`Edge` or pairs.
        reduction: the edges of each node of the reduction cell; edges from inputs have stride 2.

    Raises:
        ValueError: a field is invalid; the message names it, its value and the allowed values.
    """

    rule: str
    normal: CellGenotype
    reduction: CellGenotype

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or not RULE.fullmatch(self.rule):
            rules = ", ".join(map(repr, EDGES))
            raise ValueError(f"rule={short(self.rule)}: must be one of {rules}, or the name of an algorithm")
        for name in ("normal", "reduction"):
            object.__setattr__(self, name, _checked_cell(name, getattr(self, name), self.rule))
        if len(self.normal) != len(self.reduction):
            raise ValueError(f"reduction has {len(self.reduction)} nodes: must have {len(self.normal)}, as normal has")

    @property
    def nodes(self) -> int:
        """Number of nodes of a cell."""
        return len(self.normal)

    @property
    def version(self) -> int:
        """Version of the file."""
        return 1 if self.rule in EDGES else 2

    # --- JSON ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the genotype as JSON with a version field, one node per line."""
        cells = []
        for name in ("normal", "reduction"):
            nodes = ",\n".join("    " + json.dumps(node) for node in getattr(self, name))
            cells.append(f'  "{name}": [\n{nodes}\n  ]')
        head = f'{{\n  "version": {self.version},\n  "rule": {json.dumps(self.rule)},\n'
        return head + ",\n".join(cells) + "\n}\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of :meth:`to_json` as dicts, lists, strings and integers."""
        return json.loads(self.to_json())

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Read :meth:`to_json`'s text.

        Raises:
            ValueError: the text is not a genotype; the message names the field.
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
            ValueError: the data is not a genotype; the message names the field.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"genotype is a {type(data).__name__}: must be a JSON object")
        fields = {"version", "rule", "normal", "reduction"}
        if data.keys() != fields:
            wrong = sorted(short(key) for key in data.keys() ^ fields)
            raise ValueError(f"genotype has too many or too few fields ({', '.join(wrong)}): must be {sorted(fields)}")
        version, rule = data["version"], data["rule"]
        if type(version) is not int or version not in VERSIONS:
            raise ValueError(f"version={short(version)}: must be {' or '.join(map(str, VERSIONS))}")
        if version == 1 and not (isinstance(rule, str) and rule in EDGES):
            raise ValueError(f"rule={short(rule)}: must be one of {', '.join(map(repr, EDGES))} in version 1")
        return cls(data["rule"], data["normal"], data["reduction"])

    def save(self, path: str | Path) -> None:
        """Write the JSON file; a failure does not change an older file.

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

    # --- forms of DARTS and NNI ---------------------------------------------------------------------------------------

    def to_darts(self) -> dict[str, Any]:
        """Return the fields of DARTS's named tuple.

        They are flat ``normal`` and ``reduce`` lists of (operation, source), and both concatenations.

        Raises:
            ValueError: the rule is not ``"agd"``: DARTS's form has two edges per node.
        """
        if self.rule != "agd":
            raise ValueError(f"rule={self.rule!r}: must be 'agd', DARTS's form has two edges per node")
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
        """Read the fields of DARTS's named tuple: ``Genotype.from_darts(*DARTS_V2)``.

        Raises:
            ValueError: a list has an odd number of edges, or a cell does not concatenate all its nodes.
        """
        cells = []
        for name, edges, concat in (("normal", normal, normal_concat), ("reduce", reduce, reduce_concat)):
            if len(edges) % 2:
                raise ValueError(f"{name} has {len(edges)} edges: must have two per node")
            if list(concat) != list(range(2, 2 + len(edges) // 2)):
                raise ValueError(f"{name}_concat={short(list(concat))}: must be all nodes, 2 to {1 + len(edges) // 2}")
            cells.append(tuple(zip(edges[::2], edges[1::2])))
        return cls("agd", *cells)  # type: ignore[arg-type]

    def to_nni(self, with_sources: bool | None = None) -> dict[str, Any]:
        """Return the sample of NNI's spaces, by :class:`~optinspired_plugins.cells.labels.Label`.

        Args:
            with_sources: include the sources, for spaces that choose them; ``None`` if the rule is ``"agd"``.
        """
        with_sources = self.rule == "agd" if with_sources is None else with_sources
        sample: dict[str, Any] = {}
        for kind, cell in self._cells():
            for t, node in enumerate(cell, start=2):
                for k, edge in enumerate(node):
                    label = Label(kind, "op", t, k)
                    sample[str(label)] = edge.operation
                    if with_sources:
                        sample[str(label._replace(choice="input"))] = [edge.source]
        return sample

    @classmethod
    def from_nni(
        cls, sample: Mapping[str, Any], rule: str | None = None, sources: Sequence[Sequence[int]] | None = None
    ) -> Genotype:
        """Read a sample of NNI.

        Args:
            sample: operations, and sources if the space chooses them.
            rule: the rule; ``None`` for ``"agd"`` if the sample has sources, else ``"hb"``.
            sources: the sources of each node's edges; ``None`` if the sample has them, and for ``"hb"``.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        chooses = any("/input_" in key for key in sample)
        rule = rule or ("agd" if chooses else "hb")
        nodes = _count(sample, lambda n: Label("normal", "op", n + 2, 0))
        if sources is None and not chooses:
            sources = [heavy_ball_sources(t) for t in range(2, 2 + nodes)]
        if sources is not None:
            slots = [len(node) for node in sources]
        else:
            slots = [EDGES.get(rule) or _count(sample, lambda k: Label("normal", "op", 2, k))] * nodes
        unread = dict(sample)
        edges: dict[tuple[str, int], list[Any]] = {}
        for label in slot_labels(len(slots), slots):
            keys = [str(label), *([str(label._replace(choice="input"))] if sources is None else [])]
            missing = [key for key in keys if key not in sample]
            if missing:
                raise ValueError(f"sample has no {missing[0]!r}: must name every edge of {len(slots)} nodes")
            operation, *chosen = [unread.pop(key) for key in keys]
            source = chosen[0] if sources is None else sources[label.node - 2][cast(int, label.position)]
            source = source[0] if isinstance(source, list) and len(source) == 1 else source
            edges.setdefault((label.cell, label.node), []).append((operation, source))
        if unread:
            raise ValueError(f"sample has {short(min(unread))}: not an edge of {len(slots)} nodes")
        cells = [[edges[kind, t] for t in range(2, 2 + len(slots))] for kind in KINDS]
        return cls(rule, *cells)  # type: ignore[arg-type]

    def _cells(self) -> list[tuple[str, CellGenotype]]:
        """Return both cells by the names of DARTS and NNI."""
        return [("normal", self.normal), ("reduce", self.reduction)]


def load_genotype(genotype: Genotype | Mapping[str, Any] | str | Path) -> Genotype:
    """Return a genotype from its data, its name or a JSON file.

    Args:
        genotype: a genotype, its :meth:`~Genotype.to_dict`, one of :func:`genotype_names`, or a path.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file or the data is not a genotype.
        TypeError: the argument has another type.
    """
    if isinstance(genotype, Genotype):
        return genotype
    if isinstance(genotype, Mapping):
        return Genotype.from_dict(genotype)
    if not isinstance(genotype, (str, Path)):
        raise TypeError(f"genotype={short(genotype)}: must be a Genotype, its to_dict(), a name or a path")
    if genotype in GENOTYPES:
        return GENOTYPES[str(genotype)]
    if genotype in genotype_names():
        return Genotype.from_json((FOLDER / f"{genotype}.json").read_text(encoding="utf-8"))
    if not Path(genotype).is_file():
        raise ValueError(f"genotype={str(genotype)!r}: must be a JSON file or one of {', '.join(genotype_names())}")
    return Genotype.load(genotype)


def genotype_names() -> list[str]:
    """Return the names of the genotypes in the package, the published ones first."""
    names = {file.name.removesuffix(".json") for file in FOLDER.iterdir() if file.name.endswith(".json")}
    return [*GENOTYPES, *sorted(names - GENOTYPES.keys())]


def heavy_ball_sources(t: int) -> tuple[int, int, int]:
    """Return the sources of the edges of node t under the heavy-ball rule (23)."""
    return t - 1, t - 1, t - 2


def _count(sample: Mapping[str, Any], label_of: Callable[[int], Label]) -> int:
    """Return the number of successive labels that a sample has."""
    count = 0
    while str(label_of(count)) in sample:
        count += 1
    return count


def _checked_cell(name: str, cell: object, rule: str) -> CellGenotype:
    if not isinstance(cell, (list, tuple)) or not 1 <= len(cell) <= LIMIT_NODES:
        raise ValueError(f"{name}={short(cell)}: must be a list of 1 to {LIMIT_NODES} nodes")
    return tuple(_checked_node(f"{name}[{i}]", node, i + 2, rule) for i, node in enumerate(cell))


def _checked_node(name: str, node: object, t: int, rule: str) -> Node:
    if rule not in EDGES:
        if not isinstance(node, (list, tuple)) or not 1 <= len(node) <= LIMIT_EDGES:
            raise ValueError(f"{name}={short(node)}: must be a list of 1 to {LIMIT_EDGES} edges")
    elif not isinstance(node, (list, tuple)) or len(node) != EDGES[rule]:
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
        raise ValueError(f"{name} has operation {short(operation)}: must be one of {', '.join(CHOICES)}, {REGISTER}")
    if type(source) is not int or not 0 <= source < t:
        raise ValueError(f"{name} has source {short(source)}: must be an integer from 0 to {t - 1}")
    return Edge(operation, source)


# Liu et al. 2019 (first and second order), Xu et al. 2020 and Chen et al. 2019.
GENOTYPES = {
    name: Genotype.from_json((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("darts_v1", "darts_v2", "pc_darts_cifar", "pc_darts_image", "p_darts")
}
