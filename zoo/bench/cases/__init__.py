"""The cases of `zoo bench kernels`, a module an op."""
