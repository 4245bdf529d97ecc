"""Time the kernels beside the neurons that a user would otherwise run."""
