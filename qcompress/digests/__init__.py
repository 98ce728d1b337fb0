"""How values are read for their digests (see `qcompress.identity`).

walk       every kind of value, one after the other, without recursion
models     modules, their attributes and settings
code       functions, classes, and what they take from modules
words      the hash, the memo of what was met, tensors and arrays
ownership  what belongs to the user, and what passes write
libraries  which modules belong to Python or an installed package
bytecode   what functions do by name
"""
