"""Methods of measuring: effects of all options on a batch, by trying them, linearisation or sampled gradients."""
