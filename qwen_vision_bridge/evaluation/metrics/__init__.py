"""Metrics of edits and replies: one function each, and the registry that says what each needs of a case."""
