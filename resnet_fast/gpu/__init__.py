"""What runs a layer on a GPU: the library's kernels, the clock that compares candidates, the plan of a chain."""
