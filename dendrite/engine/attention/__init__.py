"""Attention over the paged pool: one narrow interface, several back ends that agree."""
