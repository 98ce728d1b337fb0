"""Measuring: the effect of every option on the loss, alone and together with others, at linear cost.

`measure.measure` iterates over the batches; `fisher`, `direct` and `weight_gradients` are the ways to compute the
effects of a batch; `sums` adds them up and can be saved at any time; `replay` re-runs only the modules after a changed
one.
"""
