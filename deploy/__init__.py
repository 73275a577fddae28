"""From the finished model to a small, signed, verified package."""
