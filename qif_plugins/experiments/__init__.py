"""Train networks and compare them: what the commands run."""
