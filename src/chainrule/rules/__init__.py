"""One declaration per op: its local Jacobians and how it batches."""
