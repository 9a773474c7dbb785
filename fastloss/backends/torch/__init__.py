"""PyTorch's tensors: read in place, with autograd attached to the value."""
