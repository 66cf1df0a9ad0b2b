"""Rewriting weights so that the model computes the same: what may be rewritten, shown on runs, and how."""
