"""`align inspect`: the exact tokens of a stage's first rows, and which of them carry loss."""
