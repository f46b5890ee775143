"""The specification: each op as the shortest correct PyTorch, its arguments as in pyft.ops."""
