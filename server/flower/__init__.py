"""What the coordinator uses of the private parts of Flower 1.41.0, and nowhere else in it.

Each function says what it assumes. `tests/integration/test_flower_contract.py` checks every assumption by
name, so that an upgrade of Flower fails there first.
"""
