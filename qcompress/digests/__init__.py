"""How values are read for their digests (see `qcompress.identity`).

walk       every kind of value, one after the other, without recursion
models     modules, their attributes, hooks and weights
code       functions, classes, and what they take by a name
tensors    tensors and arrays
libraries  which modules belong to Python or an installed package
hashing    the hash, and the memo of what was met
"""
