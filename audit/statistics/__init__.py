"""Bounds, curves, correlations and thresholds: numbers in, numbers out; no training and no files."""
