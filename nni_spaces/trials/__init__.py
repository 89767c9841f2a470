"""Trials: sampled networks that are trained one after another in a folder."""
