"""The backend for PyTorch tensors. Tensors are read in place, and the value of a loss has autograd attached."""
