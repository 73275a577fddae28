"""What is tried on the code that is installed here: its mechanism, attacks on it, and planted faults."""
