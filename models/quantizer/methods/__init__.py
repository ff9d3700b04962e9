"""The ways of choosing integers. Each is one function of a `BlockProblem`."""
