"""The part of a call that is the same on every machine: check and sort the arguments, and plan one pass over memory."""
