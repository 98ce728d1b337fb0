"""Measuring: the effect of every option on the loss, alone and together with others, at linear cost.

`measure` iterates over the batches, `workers` shares them out, and `sums` adds the effects up and can be saved at any
time. The rooms: `inputs` collects the statistics that options are fitted to, `methods` computes the effects of a batch,
`streamed` measures models whose weights are read block by block.
"""
