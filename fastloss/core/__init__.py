"""From a loss and the caller's arguments to a plan for one pass over memory, the same for every machine."""
