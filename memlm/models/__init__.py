"""The reference Transformers, made of plain torch modules and memlm's layers."""
