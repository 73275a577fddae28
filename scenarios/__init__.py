"""Federations that are made up on one machine: in-process grid, demo, simulation."""
