"""Triton kernels: one file per op, launchers on plain tensors; no autograd, no checks of input."""

# In a checkout this folder can also be found as the top-level name of another well-known package.
# Under that name it is empty: whoever looks for the other package finds nothing to use, and nobody
# imports pyft's kernels twice.
if __name__ == "kernels":
    __path__ = []
