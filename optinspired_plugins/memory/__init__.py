"""Fast forms of the rules: kernels that know autograd and batch normalisation, and no algorithm and no host.

:mod:`~optinspired_plugins.memory.eager` decides where a fast form may run at all. ``recompute`` repeats a pass of a
module in the backward pass, ``heavy_ball`` recovers the iterates of (16), ``dense_block`` is (21) as one function, and
``pooled_norm`` pools what is normalised and rectified.
"""
