"""Stages and blocks that propagate by an algorithm: one file per rule."""
