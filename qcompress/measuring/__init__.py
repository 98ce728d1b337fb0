"""Measuring: the effect of every option on the loss, alone and together with others, at linear cost.

`measure` iterates over the batches, `workers` distributes them, and `sums` adds up the effects and can be saved at any
time. Sub-packages: `inputs` collects the statistics that options are fitted to, `methods` computes the effects of a
batch, and `streamed` measures models whose weights are read block by block.
"""
