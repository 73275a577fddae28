"""One attempt at a round, exchange by exchange: fit, seal, open."""
