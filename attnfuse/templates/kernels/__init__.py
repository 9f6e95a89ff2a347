"""The Triton kernels: `forward`, `backward`, `empty_rows` and what they share, `tile`.

These modules import triton, so only what launches or writes device code imports them, when it does.
"""
