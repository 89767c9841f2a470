"""Optimisation algorithms: their coefficients, methods (1)-(6), objectives (8)-(9) and convergence rates (§3-§4)."""
