"""Choosing the order in which local Jacobians are multiplied."""
