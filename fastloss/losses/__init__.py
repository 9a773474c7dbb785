"""The losses, with a module for each family. Their formulas compute one element and know nothing of arrays, devices or threads.

The `__all__` of a module names its losses. Decorators make each formula a loss (for elementwise losses the public
`elementwise_loss`) and enter the loss into the table of losses (`table.py`).
"""
