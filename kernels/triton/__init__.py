"""The operations in Triton, a file each; `operations` lists them, `passes` is what they share.

Importing the package needs no Triton; importing an operation does.
"""
