"""Data readers, models, losses and metrics; nothing about privacy or transport."""
