"""Load data sets."""
