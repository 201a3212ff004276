"""TensorRT engines of a bundle's graphs: how they are built, what they say of themselves, and which one fits where.

One code path serves both products (``products``); a build runs in a process of its own (``worker``).
"""
