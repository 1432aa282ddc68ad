"""Running plans: the plan cache and straight-line replay."""
