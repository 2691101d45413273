"""The loader that ``import hfcompress`` registers with Transformers.

This package imports neither torch nor Transformers by itself: ``hook`` waits until somebody else does.
"""
