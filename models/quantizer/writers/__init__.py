"""How each checkpoint format stores a matrix, and what its config says: exactly what the formats' own tools write."""
