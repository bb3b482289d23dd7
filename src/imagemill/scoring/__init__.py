"""Evaluation: what a judge says of an edit, how it is read, and what many judgments say together."""
