"""What `train.py`, `validate.py` and `publish.py` share. Nothing else in the package imports it.

Imports run one way: errors, refusals, flags, device; then model, data, recipe, checkpoint and loop, which scripts join.
"""
