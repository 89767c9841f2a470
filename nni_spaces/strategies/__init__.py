"""Strategies: differentiable ones for supernets, and those that sample networks."""
