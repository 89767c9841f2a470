"""Figures with matplotlib: connection patterns (Figure 1), cells, and curves (§3, Table 2)."""

from .._extras import from_extra

with from_extra("viz"):
    from .cells import draw_cell, draw_cells, draw_pattern
    from .connections import connections, draw_algorithm, draw_algorithms
    from .curves import draw_condition_numbers, draw_convergence, draw_simulation

__all__ = [
    "connections",
    "draw_algorithm",
    "draw_algorithms",
    "draw_cell",
    "draw_cells",
    "draw_condition_numbers",
    "draw_convergence",
    "draw_pattern",
    "draw_simulation",
]
