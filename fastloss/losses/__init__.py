"""The mathematics: one formula per loss, which knows nothing of arrays, devices or threads.

Each formula is made a loss where it stands, by the same decorator that users have; so this folder imports `fastloss.loss`
and nothing of the library but `__init__` imports it.
"""
