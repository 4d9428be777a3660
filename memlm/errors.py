"""Exceptions of memlm's own."""


class FormatError(ValueError):
    """A file, or a set of packed tensors, does not follow the format it claims to follow."""


class OutOfBlocks(RuntimeError):
    """A paged cache of fixed size has no block left."""
