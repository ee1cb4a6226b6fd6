"""Ops that mixers share, one folder each: the API in `__init__.py`, then one file a backend.

reference.py is the recurrence, step by step, in fp32 or fp64; chunked.py the parallel form in plain torch; triton.py
the fused kernels. Backends never import each other.
"""
