"""Count a network's operations and estimate their energy."""
