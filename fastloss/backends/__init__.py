"""The frameworks whose arrays losses take, each behind the same protocol."""
