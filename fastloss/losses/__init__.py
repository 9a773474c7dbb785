"""The mathematics: one formula for each loss, which knows nothing of arrays, devices or threads.

A family of losses is a module, whose `__all__` names them. Each formula becomes a loss where it stands, by the decorator that users
have too, and enters the table of losses (`table.py`).
"""
