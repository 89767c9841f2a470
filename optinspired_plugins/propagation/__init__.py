"""Algorithms as networks (§5-§7): the rules (16)-(21) as plain functions in ``rules``.

- ``rules``: one function per equation, and ``EQUATIONS``, a table of the implementations of (1)-(29);
- ``unrolled``: any algorithm as a network, which gives (7) and (11)-(14);
- ``tracing``: an algorithm as a program of sums and layers; ``recorded`` saves it as JSON;
- ``patterns``: the edges of a cell whose nodes are an algorithm's points, for search spaces;
- ``probing``: the number of layers per step.
"""
