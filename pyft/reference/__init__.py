"""The specification: every op as the shortest correct PyTorch, same names and arguments as in
``pyft.ops``.
"""
