"""The custom operators behind the ops, one file for each family.

The portable path is torch; on CUDA, Triton kernels (``stepagent.kernels``) where there are any.
"""
