"""Quantising with a text at hand: what a matrix is multiplied with decides how its rounding errors are made good."""
