"""Algorithms as networks: the propagation rules (16)-(21), unrolled networks (7) and (11)-(14), and traced programs."""
