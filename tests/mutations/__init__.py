"""Break the package in many ways, one at a time, and report which broken versions the tests accept: `python -m tests.mutations`."""
