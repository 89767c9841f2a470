"""Kernels: fast forms of the rules with less memory. They import no algorithm and no host.

- ``heavy_ball``: (16) with reversible iterates, recovered in the backward pass;
- ``dense_block``: (21) as one autograd function;
- ``recompute``: checkpointing of modules with buffers and random numbers;
- ``batch_norm``: statistics and fixed normalisations;
- ``eager``: the passes in which a kernel may run; ``double_backward``: its gradient where it must be differentiable;
- ``memory_format``: channels last in training.
"""
