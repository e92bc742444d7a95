"""All that is drawn: bits that belong to a key, such as (seed, word, epoch, step), whoever computes them, and when.

`bits` has them for numpy and Numba, and needs no torch; `rows` for rows of tensors; `words` tells uses apart.
"""
