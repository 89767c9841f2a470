"""Optimisation algorithms (§3-§4): (1)-(6) in ``methods``, (8)-(9) and Table 1 in ``objectives``.

``coefficients`` has θ (3), the momentum of (12) and h (5): every network reads them from there. ``rates`` measures the
convergence rates of section 3.
"""
