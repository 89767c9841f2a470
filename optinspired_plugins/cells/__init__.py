"""Cells (§9): the operations of Table 6 in ``operations``, and genotypes in ``genotype``.

- ``genotypes/``: published genotypes and results of searches, one JSON file each;
- ``labels``: NNI's labels of choices, as ``normal/op_2_0``;
- ``network``: channels and strides of a network of cells, its stem and preprocessors;
- ``drawing``: the layout of a drawn cell, and SVG.

Nodes (23), (27) and (28) of the search spaces are in ``nni_spaces.spaces``.
"""
