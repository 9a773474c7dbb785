"""The mathematics: one formula per loss, which knows nothing of arrays, devices or threads."""
