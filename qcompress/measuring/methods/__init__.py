"""Methods of measuring all options on a batch: direct evaluation, linearisation, sampled gradients."""
