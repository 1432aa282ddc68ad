"""Structured linear maps: terms over named axes, their products and sums."""
