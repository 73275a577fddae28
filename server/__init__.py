"""The coordinator: SuperLink launcher, rounds, run store. It holds no secret of any owner."""
