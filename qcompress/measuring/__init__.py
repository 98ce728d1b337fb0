"""Measuring: what every option does to the loss, alone and together with others, at linear cost.

`run.measure` walks over the batches; `fisher` and `direct` are the two ways to the effects of a batch; `gram` adds
them up and can be saved at any time; `replay` re-runs only what lies behind a changed module.
"""
