"""Examples and batches for models of `shardspec.families`: kernels, layout, packs, collation.

Decides which values and names a model's `forward` is given. Never decides sizes, grids or numbers
of tokens: these are the families' plans.
"""
