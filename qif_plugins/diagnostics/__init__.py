"""Measure networks: health, calibration, firing rates, energy."""
