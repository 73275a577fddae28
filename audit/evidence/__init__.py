"""What is known of a run and of what was tried, as values; no judgement and no work."""
